// Residents and transfers decided together: the fewest guests with which no rank has more than a cap.
//
//     1. The bound: what any number of copies could reach. Without domains the mean; with them a flow between domains.
//     2. The LP over resident copies, and over what guest slots hold from before, as a flow of whole tokens (flow.h):
//        all tokens start at home, and leave ranks above the cap along shortest paths. Nothing travels for it.
//     3. What is still above the cap spills: of a rank the expert with most tokens goes, to the rank whose room is the
//        tightest that fits, or the largest where none fits. Every guest so ends an excess, a room or an expert, and
//        one that ends two of them saves a transfer. Where slots are tight, a rank without room takes a guest and
//        passes as many tokens on, over guests that relieve it already.
//
// The fewest transfers are a packing problem, NP-hard; step 3 runs in several orders and keeps the best. Where slots,
// or transfers, are too few for the cap, bisection finds the least cap that they suffice for.
#pragma once

#include "present_copies.h"

namespace lplb {
inline namespace LPLB_ISA {

struct JointRules {
  double tolerance;    // above the bound, relative
  int64_t max_tokens;  // on a rank; INT64_MAX where there is no limit
  int max_transfers;   // of a batch
  int64_t min_tokens;  // of a guest, at least 1
};

template <int kWords, class Warp>
class Joint : PresentCopies<kWords, Warp> {
  using Copies = PresentCopies<kWords, Warp>;
  using Copies::batch_, Copies::bound_, Copies::g_, Copies::p_, Copies::warp_, Copies::x_;
  using Copies::largest_load, Copies::relieve_to, Copies::without_transfers;
  using typename Copies::Set;

 public:
  LPLB_HD Joint(Warp& warp, const TransferProblem& p, const JointRules& rules, const TransferBatch& batch,
                const JointSpace& x)
      : Copies(warp, p, batch, x), rules_(rules), room_(rules.min_tokens) {
    most_ = static_cast<int>(joint::least(rules.max_transfers, p.n_rows));
  }

  LPLB_HD joint::Level bound() const { return bound_; }
  LPLB_HD int n_transfers() const { return n_spills_; }

  // The cap that the rules ask for.
  LPLB_HD int64_t cap() const {
    const auto relaxed = static_cast<int64_t>((1.0 + rules_.tolerance) * bound_.value());
    return joint::least(joint::most(bound_.whole(), relaxed), rules_.max_tokens);
  }

  // Finds the plan, to be written by `write`.
  LPLB_HD void plan() {
    const int64_t wanted = joint::most(cap(), bound_.whole());
    n_spills_ = 0;
    const int64_t without = without_transfers();
    if (without <= wanted || most_ == 0) return;
    if (attempt(wanted, most_) > most_) least_cap(wanted, without, most_);
    if (wanted > bound_.whole()) even_out();
  }

  // What the rank with most tokens has at least, for every number of transfers that lowers it: put(k, max_load,
  // transfers), k = 0, 1, … below `capacity`. Returns how many.
  template <class Put>
  LPLB_HD int front(int capacity, Put put) {
    n_spills_ = 0;
    int64_t reached = without_transfers();
    const int64_t low = bound_.whole() - 1;
    int n = 0;
    if (capacity > 0) put(n++, reached, 0);
    const int64_t lowest = attempt(low + 1, most_) <= most_ ? low + 1 : least_cap(low + 1, reached, most_);
    const int enough = n_spills_;
    for (int transfers = 1; transfers <= enough && n < capacity && reached > lowest; ++transfers) {
      const int64_t now = transfers < enough ? least_cap(low, reached, transfers) : lowest;
      if (now >= reached) continue;
      reached = now;
      put(n++, reached, transfers < enough ? n_spills_ : enough);
    }
    return n;
  }

  // The plan that was found.
  LPLB_HD void write(int64_t tokens, const TransferArrays& out) {
    const int n_ranks = p_.n_ranks;
    warp_.each(p_.n_experts * n_ranks, [&](int i) { out.quota[i] = 0; });
    warp_.sync();
    warp_.each(g_.n_copies,
               [&](int c) { out.quota[int64_t{g_.replica_expert[c]} * n_ranks + g_.replica_rank[c]] = x_.y[c]; });
    warp_.each(n_spills_, [&](int i) {
      const Spill& spill = x_.spills[i];
      x_.guests[i] = {g_.replica_expert[spill.copy], spill.rank};
    });
    warp_.each(n_ranks, [&](int r) { out.rank_load[r] = x_.load[r]; });
    warp_.sync();
    if (warp_.rank() == 0)
      for (int i = 0; i < n_spills_; ++i)  // two may be of one expert and rank
        out.quota[int64_t{x_.guests[i].expert} * n_ranks + x_.guests[i].rank] += x_.spills[i].tokens;
    warp_.sync();
    settle_guests(warp_, p_, batch_, x_.guests, n_spills_, {tokens, cap(), bound_.whole(), bound_.value()}, x_.counts,
                  out);
  }

 private:
  enum Order { kLargestFirst, kSmallestFirst };

  // Spills down to the cap. Returns the number of transfers, most + 1 where it takes more than `most`, or does not go.
  LPLB_HD int spill(int64_t cap, Order order, int most) {
    warp_.sync();  // of the try before everybody has read all
    warp_.each(g_.n_copies, [&](int c) { x_.y[c] = x_.start_y[c]; });
    warp_.each(g_.n_ranks, [&](int r) {
      x_.load[r] = x_.start_load[r];
      x_.used[r] = x_.start_used[r];
    });
    warp_.each(p_.n_experts, [&](int e) {
      const Set far = Set::first(p_.n_ranks).without(within_reach<kWords>(p_, e));
      (Set::read(g_.expert_ranks + kWords * e) | far).write(x_.closed + kWords * e);
    });
    warp_.sync();
    n_spills_ = 0;
    Set over = ranks_where<kWords>(warp_, p_.n_ranks, [&](int r) { return x_.load[r] > cap; });
    open_ = ranks_where<kWords>(warp_, p_.n_ranks, [&](int r) { return is_open(r, cap); });
    while (!over.empty()) {
      const int r = next_rank(over, cap, order);
      if (!(g_.shared && top_up(r, cap))) {
        if (n_spills_ == most || !(spill_one(r, cap) || pass_on(r, cap))) return most + 1;
      }
      if (x_.load[r] <= cap) over.drop(r);
    }
    return n_spills_;
  }

  // Where a rank's tokens may go: domains that have shed what they could not serve keep the rest.
  LPLB_HD Set reachable(int r) const {
    if (!by_domain_) return Set::first(p_.n_ranks);
    const int first = r / p_.domain * p_.domain;
    return Set::first(first + p_.domain).without(Set::first(first));
  }

  LPLB_HD bool is_open(int r, int64_t cap) const { return cap - x_.load[r] >= room_ && x_.used[r] < p_.n_slots; }

  LPLB_HD int next_rank(Set over, int64_t cap, Order order) {
    return first_least_of(warp_, over, p_.n_ranks, [&](int r) {
      const int64_t excess = x_.load[r] - cap;
      return order == kSmallestFirst ? excess : kMostTransferTokens - excess;
    });
  }

  // More tokens for the guests that there are: they cost nothing. Whether the rank is below the cap then. Only where
  // experts have several copies: otherwise a guest has taken all that it could.
  LPLB_HD bool top_up(int r, int64_t cap) {
    warp_.sync();
    if (warp_.rank() == 0) {
      LPLB_LOOP
      for (int i = 0; i < n_spills_ && x_.load[r] > cap; ++i) {
        Spill& spill = x_.spills[i];
        const int e = g_.replica_expert[spill.copy];
        const Set on = Set::read(g_.expert_ranks + kWords * e);
        if (!on.has(r) || !reachable(r).has(spill.rank) || x_.load[spill.rank] >= cap) continue;
        const int c = g_.expert_begin[e] + on.count_below(r);
        const int64_t tokens = joint::least(joint::least(x_.load[r] - cap, cap - x_.load[spill.rank]), x_.y[c]);
        x_.y[c] -= tokens;
        x_.load[r] -= tokens;
        x_.load[spill.rank] += tokens;
        spill.tokens += tokens;
      }
    }
    warp_.sync();
    open_ = ranks_where<kWords>(warp_, p_.n_ranks, [&](int i) { return is_open(i, cap); });
    return x_.load[r] <= cap;
  }

  // One guest for a rank above the cap; false where there is no place for one.
  LPLB_HD bool spill_one(int r, int64_t cap) {
    const int begin = g_.rank_begin[r], n = g_.rank_begin[r + 1] - begin;
    const Set open = open_ & reachable(r);
    const int at = first_least(warp_, n, [&](int i) {
      const int c = g_.rank_replica[begin + i];
      const Set closed = Set::read(x_.closed + kWords * g_.replica_expert[c]);
      return x_.y[c] >= room_ && !open.without(closed).empty() ? kMostTransferTokens - x_.y[c] : int64_t{-1};
    });
    if (at == n) return false;
    const int c = g_.rank_replica[begin + at], e = g_.replica_expert[c];
    const Set closed = Set::read(x_.closed + kWords * e), to = open.without(closed);
    const int64_t wanted = joint::most(joint::least(x_.load[r] - cap, x_.y[c]), room_);
    constexpr int64_t kTooSmall = int64_t{1} << 54;  // a larger value than any room that fits
    const int j = first_least_of(warp_, to, p_.n_ranks, [&](int i) {
      const int64_t room = cap - x_.load[i];
      return room >= wanted ? room : 2 * kTooSmall - room;
    });
    const int64_t tokens = joint::least(wanted, cap - x_.load[j]);
    const int64_t left = x_.load[r] - tokens, load = x_.load[j] + tokens;
    warp_.sync();  // everybody has read them
    if (warp_.rank() == 0) {
      x_.y[c] -= tokens;
      x_.load[r] = left;
      x_.load[j] = load;
      ++x_.used[j];
      Set now = closed;
      now.add(j);
      now.write(x_.closed + kWords * e);
      x_.spills[n_spills_] = {c, j, tokens};
    }
    ++n_spills_;
    warp_.sync();
    if (!is_open(j, cap)) open_.drop(j);
    if (is_open(r, cap)) open_.add(r);  // a guest's minimum was more than the excess
    return true;
  }

  // How many tokens each rank but r can take or pass on, guest by guest that relieves it, to one with room: the widest
  // way, in shed. giver: the spill that is its first step, -1 for a rank that takes them itself.
  LPLB_HD void find_ways(int r, int64_t cap) {
    int64_t *shed = x_.shed, *wider = x_.shed + p_.n_ranks;
    int32_t *way = x_.giver, *next_way = x_.taker;
    warp_.sync();
    warp_.each(p_.n_ranks, [&](int i) {
      shed[i] = i == r ? 0 : joint::most(0, cap - x_.load[i]);
      way[i] = -1;
    });
    warp_.sync();
    const auto widen = [&](int s) {  // by a step over one spill
      const Spill& spill = x_.spills[s];
      const int from = g_.replica_rank[spill.copy];
      const int64_t tokens = joint::least(x_.y[spill.copy], shed[spill.rank]);
      if (from == r || tokens <= wider[from]) return;
      wider[from] = tokens;
      next_way[from] = s;
    };
    for (bool more = true; more;) {
      warp_.each(p_.n_ranks, [&](int i) {
        wider[i] = shed[i];
        next_way[i] = way[i];
      });
      warp_.sync();
      LPLB_LOOP
      for (int s = 0; s < n_spills_; ++s)  // each by the member that keeps its rank
        if (g_.replica_rank[x_.spills[s].copy] % warp_.size() == warp_.rank()) widen(s);
      warp_.sync();
      more = !ranks_where<kWords>(warp_, p_.n_ranks, [&](int i) { return wider[i] > shed[i]; }).empty();
      warp_.sync();
      warp_.each(p_.n_ranks, [&](int i) {
        shed[i] = wider[i];
        way[i] = next_way[i];
      });
      warp_.sync();
    }
  }

  // A guest on a rank `via` that has a free slot, and no room: it passes on as many tokens of its own, over guests that
  // relieve it already, to a rank that has room but no slot. False where there is no such way.
  LPLB_HD bool pass_on(int r, int64_t cap) {
    find_ways(r, cap);
    const int begin = g_.rank_begin[r], n = g_.rank_begin[r + 1] - begin;
    const auto copy_for = [&](int via) {  // what of r goes there: of its experts that with most tokens
      int best = -1;
      LPLB_LOOP
      for (int i = begin; i < begin + n; ++i) {
        const int c = g_.rank_replica[i];
        const bool closed = Set::read(x_.closed + kWords * g_.replica_expert[c]).has(via);
        if (!closed && x_.y[c] >= room_ && (best < 0 || x_.y[c] > x_.y[best])) best = c;
      }
      return best;
    };
    const int64_t excess = x_.load[r] - cap;
    const Set reach = reachable(r);
    const int via = first_least(warp_, p_.n_ranks, [&](int i) {
      if (i == r || !reach.has(i) || x_.load[i] > cap || x_.used[i] >= p_.n_slots || x_.shed[i] < room_)
        return int64_t{-1};
      const int c = copy_for(i);
      if (c < 0) return int64_t{-1};
      const int64_t tokens = joint::least(joint::least(excess, x_.y[c]), x_.shed[i]);
      return tokens >= room_ ? kMostTransferTokens - tokens : int64_t{-1};
    });
    if (via == p_.n_ranks) return false;
    const int c = copy_for(via);
    const int64_t tokens = joint::least(joint::least(excess, x_.y[c]), x_.shed[via]);
    int last = via;
    while (x_.giver[last] >= 0) last = x_.spills[x_.giver[last]].rank;
    warp_.sync();  // everybody has read them
    if (warp_.rank() == 0) {
      for (int at = via; x_.giver[at] >= 0; at = x_.spills[x_.giver[at]].rank) {
        Spill& spill = x_.spills[x_.giver[at]];
        x_.y[spill.copy] -= tokens;
        spill.tokens += tokens;
      }
      x_.load[last] += tokens;
      x_.y[c] -= tokens;
      x_.load[r] -= tokens;
      ++x_.used[via];
      uint64_t* closed = x_.closed + kWords * g_.replica_expert[c];
      Set now = Set::read(closed);
      now.add(via);
      now.write(closed);
      x_.spills[n_spills_] = {c, via, tokens};
    }
    ++n_spills_;
    warp_.sync();
    for (const int i : {via, last})
      if (!is_open(i, cap)) open_.drop(i);
    return true;
  }

  // The fewest transfers of several tries, of which the plan is left; most + 1 where none of them does.
  LPLB_HD int attempt(int64_t cap, int most) {
    int best = most + 1;
    for (int start = 0; start < (p_.of_domains.shared && p_.n_domains() > 1 ? 4 : g_.shared ? 2 : 1); ++start) {
      by_domain_ = start >= 2;
      const int over = relieve_to(cap, start % 2 != 0, by_domain_);  // each of them takes a transfer at least
      const int n_orders = over > 1 ? 2 : 1;
      for (int order = 0; order < n_orders && over < best; ++order) {
        const int n = spill(cap, order == 0 ? kSmallestFirst : kLargestFirst, best - 1);
        if (n >= best) continue;
        best = n;
        swap_kept();
      }
    }
    if (best > most) return best;
    swap_kept();
    n_spills_ = best;
    return best;
  }

  LPLB_HD void swap_kept() {
    int64_t *y = x_.y, *load = x_.load;
    Spill* spills = x_.spills;
    x_.y = x_.kept_y;
    x_.load = x_.kept_load;
    x_.spills = x_.kept_spills;
    x_.kept_y = y;
    x_.kept_load = load;
    x_.kept_spills = spills;
  }

  // The least cap above `low` that at most so many transfers reach, to 1 in 2^13, as they reach `high`. Leaves the
  // plan.
  LPLB_HD int64_t least_cap(int64_t low, int64_t high, int most) {
    while (high - low > joint::most(1, high >> 13)) {
      const int64_t middle = low + (high - low) / 2;
      if (attempt(middle, most) <= most)
        high = middle;
      else
        low = middle;
    }
    attempt(high, most);
    return largest_load(p_.n_ranks);
  }

  // Tokens between guests and the copies that they relieve, so that neither rank has more than it need: below the cap
  // there is room that costs no transfer.
  LPLB_HD void even_out() {
    warp_.sync();
    if (warp_.rank() == 0) {
      LPLB_LOOP
      for (int i = 0; i < 3 * n_spills_; ++i) {
        Spill& spill = x_.spills[i % n_spills_];
        int64_t &from = x_.load[g_.replica_rank[spill.copy]], &to = x_.load[spill.rank];
        const int64_t half = (from - to) / 2;
        const int64_t tokens =
            half > 0 ? joint::least(half, x_.y[spill.copy]) : joint::most(half, room_ - spill.tokens);
        x_.y[spill.copy] -= tokens;
        spill.tokens += tokens;
        from -= tokens;
        to += tokens;
      }
    }
    warp_.sync();
  }

  const JointRules& rules_;
  int64_t room_;  // what a guest must have at least
  int most_ = 0, n_spills_ = 0;
  bool by_domain_ = false;
  Set open_ = Set::none();  // ranks that take guests
};

}  // namespace LPLB_ISA
}  // namespace lplb
