// Residents and transfers decided together: the fewest guests with which no rank has more than a cap.
//
//     1. The bound: what any number of copies could reach. Without domains the mean; with them a flow between domains.
//     2. The LP over resident copies, and over what guest slots hold from before, as a flow of whole tokens (flow.h):
//        all tokens start at home, and leave ranks above the cap along shortest paths. Nothing travels for it.
//     3. What is still above the cap spills: of a rank the expert with most tokens goes, to the rank whose room is the
//        tightest that fits, or the largest where none fits. Every guest so ends an excess, a room or an expert, and
//        one that ends two of them saves a transfer.
//
// The fewest transfers are a packing problem, NP-hard; step 3 runs in several orders and keeps the best. Where slots,
// or transfers, are too few for the cap, bisection finds the least cap that they suffice for.
#pragma once

#include "flow.h"
#include "transfer_plan.h"

namespace lplb {
inline namespace LPLB_ISA {

struct JointRules {
  double tolerance;    // above the bound, relative
  int64_t max_tokens;  // on a rank; INT64_MAX where there is no limit
  int max_transfers;   // of a batch
  int64_t min_tokens;  // of a guest, at least 1
};

// Tokens that leave a copy, for a guest.
struct Spill {
  int32_t copy, rank;
  int64_t tokens;
};

// Where one plan is made.
struct JointSpace {
  int64_t *y, *load, *limit;      // per copy; per rank
  int64_t *start_y, *start_load;  // what step 2 leaves
  int64_t *kept_y, *kept_load;    // the best try so far
  uint64_t* closed;               // [n_experts, kWords] ranks that an expert cannot go to: it is there, or too far
  int32_t *used, *start_used;     // guest slots of a rank that serve tokens
  uint64_t *reach, *level;        // Flow's
  int32_t *path, *giver, *taker;
  Spill *spills, *kept_spills;  // [n_rows]
  Guest* guests;                // [n_rows]
  int32_t* counts;              // [2, n_ranks]
  // the copies where guest slots hold some: residents and those
  int32_t *expert_begin, *replica_rank, *replica_expert, *rank_begin, *rank_replica;
  uint64_t *rank_replica_ranks, *expert_ranks;
};

// Hands out the memory at `base`, or only measures it where base is null. Returns the bytes used. with_held: whether
// batches may come with guests from before.
LPLB_HD inline size_t carve_joint(const TransferProblem& p, bool with_held, std::byte* base, JointSpace& x) {
  size_t used = 0;
  auto take = [&](auto*& pointer, size_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    if (base != nullptr) pointer = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
  };
  const size_t held = with_held ? static_cast<size_t>(p.n_ranks) * p.n_slots : 0;
  const size_t e = p.n_experts, r = p.n_ranks, words = set_words(p.n_ranks), rows = p.n_rows;
  const size_t c = p.resident.n_copies + held;
  take(x.y, c);
  take(x.load, r);
  take(x.limit, r);
  take(x.start_y, c);
  take(x.start_load, r);
  take(x.kept_y, c);
  take(x.kept_load, r);
  take(x.closed, words * e);
  take(x.used, r);
  take(x.start_used, r);
  take(x.reach, words * r);
  take(x.level, words * (r + 1));
  take(x.path, r + 1);
  take(x.giver, r + 1);
  take(x.taker, r + 1);
  take(x.spills, rows);
  take(x.kept_spills, rows);
  take(x.guests, rows);
  take(x.counts, 2 * r);
  const size_t built = with_held ? 1 : 0;
  take(x.expert_begin, built * (e + 1));
  take(x.replica_rank, built * c);
  take(x.replica_expert, built * c);
  take(x.rank_begin, built * (r + 1));
  take(x.rank_replica, built * c);
  take(x.rank_replica_ranks, built * words * c);
  take(x.expert_ranks, built * words * e);
  return used;
}

namespace joint {

inline constexpr int64_t kNoLimit = INT64_MAX / 4;

LPLB_HD inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LPLB_HD inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
LPLB_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// tokens / ranks
struct Level {
  int64_t tokens, ranks;
  LPLB_HD int64_t whole() const { return ceil_div(tokens, ranks); }
  LPLB_HD double value() const { return static_cast<double>(tokens) / static_cast<double>(ranks); }
};

}  // namespace joint

template <int kWords, class Warp>
class Joint {
 public:
  using Set = RankSet<kWords>;

  LPLB_HD Joint(Warp& warp, const TransferProblem& p, const JointRules& rules, const TransferBatch& batch,
                const JointSpace& x)
      : warp_(warp), p_(p), rules_(rules), batch_(batch), x_(x), g_(p.resident), room_(rules.min_tokens) {
    if (batch.held != nullptr) build_copies();
    bound_ = find_bound();
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
    const int64_t without = without_transfers();
    if (without <= wanted || most_ == 0) return;
    if (attempt(wanted, most_) > most_) least_cap(wanted, without, most_);
    if (wanted > bound_.whole()) even_out();
  }

  // What the rank with most tokens has at least, for every number of transfers that lowers it: put(k, max_load,
  // transfers), k = 0, 1, … below `capacity`. Returns how many.
  template <class Put>
  LPLB_HD int front(int capacity, Put put) {
    int64_t reached = without_transfers();
    const int64_t low = bound_.whole() - 1;
    int n = 0;
    if (capacity > 0) put(n++, reached, 0);
    const int64_t lowest = least_cap(low, reached, most_);
    const int enough = n_spills_;
    for (int transfers = 1; transfers <= enough && n < capacity && reached > lowest; ++transfers) {
      const int64_t now = transfers < enough ? least_cap(low, reached, transfers) : lowest;
      if (now >= reached) continue;
      reached = now;
      put(n++, reached, transfers < enough ? n_spills_ : enough);
    }
    return n;
  }

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
  using Walk = Flow<int64_t, kWords, Warp, CopyTables>;

  LPLB_HD Walk walk(const CopyTables& g) const {
    return {warp_, g, x_.y, x_.load, x_.limit, x_.reach, x_.level, x_.path, x_.giver, x_.taker, int64_t{0}, {}, {}};
  }

  // ---- copies: residents and what guest slots hold

  LPLB_HD void build_copies() {
    const CopyTables& from = p_.resident;
    const int n_places = p_.n_ranks * p_.n_slots;
    warp_.each(p_.n_experts,
               [&](int e) { Set::read(from.expert_ranks + kWords * e).write(x_.expert_ranks + kWords * e); });
    warp_.sync();
    if (warp_.rank() == 0) {
      LPLB_LOOP
      for (int i = 0; i < n_places; ++i) {
        const int e = batch_.held[i], r = i / p_.n_slots;
        if (e < 0 || !within_reach<kWords>(p_, e).has(r)) continue;
        Set s = Set::read(x_.expert_ranks + kWords * e);
        s.add(r);
        s.write(x_.expert_ranks + kWords * e);
      }
      x_.expert_begin[0] = 0;
      LPLB_LOOP
      for (int e = 0; e < p_.n_experts; ++e)
        x_.expert_begin[e + 1] = x_.expert_begin[e] + Set::read(x_.expert_ranks + kWords * e).count_below(p_.n_ranks);
    }
    warp_.sync();
    warp_.each(p_.n_experts, [&](int e) {
      int c = x_.expert_begin[e];
      for (Set s = Set::read(x_.expert_ranks + kWords * e); !s.empty(); ++c) {
        const int r = s.lowest();
        s.drop(r);
        x_.replica_rank[c] = r;
        x_.replica_expert[c] = e;
      }
    });
    warp_.sync();
    if (warp_.rank() == 0) {
      int32_t* begin = x_.rank_begin;
      for (int r = 0; r <= p_.n_ranks; ++r) begin[r] = 0;
      const int n_copies = x_.expert_begin[p_.n_experts];
      LPLB_LOOP
      for (int c = 0; c < n_copies; ++c) ++begin[x_.replica_rank[c] + 1];
      for (int r = 0; r < p_.n_ranks; ++r) begin[r + 1] += begin[r];
      LPLB_LOOP
      for (int c = 0; c < n_copies; ++c) x_.rank_replica[begin[x_.replica_rank[c]]++] = c;
      for (int r = p_.n_ranks; r > 0; --r) begin[r] = begin[r - 1];
      begin[0] = 0;
    }
    warp_.sync();
    g_ = {p_.n_experts,
          p_.n_ranks,
          x_.expert_begin[p_.n_experts],
          x_.expert_begin,
          x_.replica_rank,
          x_.replica_expert,
          x_.rank_begin,
          x_.rank_replica,
          x_.rank_replica_ranks,
          x_.expert_ranks,
          x_.expert_begin[p_.n_experts] > p_.n_experts};
    warp_.each(g_.n_copies, [&](int i) {
      Set::read(g_.expert_ranks + kWords * g_.replica_expert[g_.rank_replica[i]])
          .write(x_.rank_replica_ranks + kWords * i);
    });
    warp_.sync();
  }

  // Copies that came for an earlier batch.
  LPLB_HD bool is_guest(int c) const {
    return !Set::read(p_.resident.expert_ranks + kWords * g_.replica_expert[c]).has(g_.replica_rank[c]);
  }

  // ---- steps 1 and 2

  // All tokens at home, `times` as many as there are.
  LPLB_HD void stay_home(const CopyTables& g, int64_t times) {
    warp_.sync();
    warp_.each(g.n_copies, [&](int c) {
      const int e = g.replica_expert[c];
      const int home = g.n_ranks == p_.n_ranks ? p_.home(e) : g.replica_rank[g.expert_begin[e]];
      x_.y[c] = g.replica_rank[c] == home ? batch_.tokens[e] * times : 0;
    });
    warp_.sync();
    warp_.each(g.n_ranks, [&](int r) {
      int64_t load = 0;
      in_order<8, true>(
          g.rank_begin[r], g.rank_begin[r + 1], [&](int i) { return x_.y[g.rank_replica[i]]; },
          [&](int, int64_t y) { load += y; });
      x_.load[r] = load;
    });
    warp_.sync();
  }

  LPLB_HD void set_limits(int n, int64_t limit) {
    warp_.sync();
    warp_.each(n, [&](int r) { x_.limit[r] = limit; });
    warp_.sync();
  }

  LPLB_HD int64_t load_of(Set set, int n) {
    return whole_sum(warp_, n, [&](int r) { return set.has(r) ? x_.load[r] : int64_t{0}; });
  }

  LPLB_HD int64_t largest_load(int n) {
    int64_t load = 0;
    LPLB_LOOP
    for (int r = warp_.rank(); r < n; r += warp_.size()) load = joint::most(load, x_.load[r]);
    return fold(warp_, load, [](int64_t a, int64_t b) { return joint::most(a, b); });
  }

  // The largest, over sets of domains, of what only they can take, per rank. A set's load does not change when tokens
  // move where they can: what is stuck is all its own.
  LPLB_HD joint::Level find_bound() {
    const CopyTables& g = p_.of_domains;
    const int64_t total = whole_sum(warp_, p_.n_experts, [&](int e) { return batch_.tokens[e]; });
    if (g.n_ranks == 1) return {total, p_.n_ranks};
    if (!g.shared) {
      stay_home(g, 1);
      return {largest_load(g.n_ranks), p_.domain};
    }
    int64_t tokens = total, domains = g.n_ranks;
    for (;;) {  // Newton: with `domains` times the tokens a domain's share at this level is whole
      stay_home(g, domains);
      set_limits(g.n_ranks, tokens);
      Walk f = walk(g);
      f.find_reach();
      f.classify();
      Set stuck = Set::none();
      if (f.relieve(stuck)) return {tokens, domains * p_.domain};
      tokens = load_of(stuck, g.n_ranks) / domains;
      domains = stuck.count_below(g.n_ranks);
    }
  }

  // The LP in whole tokens: the least maximum that present copies allow, which is left in y.
  LPLB_HD int64_t without_transfers() {
    n_spills_ = 0;
    stay_home(g_, 1);
    int64_t limit = largest_load(g_.n_ranks);
    if (g_.shared) {
      limit = bound_.whole();
      Walk f = walk(g_);
      f.find_reach();
      for (;;) {
        set_limits(g_.n_ranks, limit);
        f.classify();
        Set stuck = Set::none();
        if (f.relieve(stuck)) break;
        limit = joint::ceil_div(load_of(stuck, g_.n_ranks), stuck.count_below(g_.n_ranks));
      }
    }
    keep_start();
    return limit;
  }

  // Tokens of all experts on a rank, most of them perhaps elsewhere.
  LPLB_HD int64_t most_held(int r) const {
    int64_t tokens = 0;
    in_order<8, true>(
        g_.rank_begin[r], g_.rank_begin[r + 1],
        [&](int i) { return batch_.tokens[g_.replica_expert[g_.rank_replica[i]]]; },
        [&](int, int64_t w) { tokens += w; });
    return tokens;
  }

  // What cannot be brought below the cap stays above it: on the ranks where the flow leaves it, or gathered on few.
  // Returns how many ranks are above.
  LPLB_HD int relieve_to(int64_t cap, bool gathered) {
    stay_home(g_, 1);
    if (g_.shared) {
      set_limits(g_.n_ranks, cap);
      Walk f = walk(g_);
      f.find_reach();
      f.classify();
      Set stuck = Set::none();
      while (!f.relieve(stuck) && gathered) {
        const int r = first_least(
            warp_, g_.n_ranks, [&](int i) { return stuck.has(i) ? kMostTransferTokens - most_held(i) : int64_t{-1}; });
        warp_.sync();
        if (warp_.rank() == 0) x_.limit[r] = joint::kNoLimit;
        warp_.sync();
        f.classify();
      }
      warp_.sync();
    }
    keep_start();
    return ranks_where<kWords>(warp_, g_.n_ranks, [&](int r) { return x_.load[r] > cap; }).count_below(g_.n_ranks);
  }

  LPLB_HD void keep_start() {
    warp_.each(g_.n_copies, [&](int c) { x_.start_y[c] = x_.y[c]; });
    warp_.each(g_.n_ranks, [&](int r) {
      x_.start_load[r] = x_.load[r];
      int used = 0;
      if (batch_.held != nullptr)
        for (int i = g_.rank_begin[r]; i < g_.rank_begin[r + 1]; ++i)
          used += x_.y[g_.rank_replica[i]] > 0 && is_guest(g_.rank_replica[i]);
      x_.start_used[r] = used;
    });
    warp_.sync();
  }

  // ---- step 3

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

  LPLB_HD bool is_open(int r, int64_t cap) const { return cap - x_.load[r] >= room_ && x_.used[r] < p_.n_slots; }

  LPLB_HD int next_rank(Set over, int64_t cap, Order order) {
    return first_least(warp_, p_.n_ranks, [&](int r) {
      if (!over.has(r)) return int64_t{-1};
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
        if (!on.has(r) || x_.load[spill.rank] >= cap) continue;
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
    const int at = first_least(warp_, n, [&](int i) {
      const int c = g_.rank_replica[begin + i];
      const Set closed = Set::read(x_.closed + kWords * g_.replica_expert[c]);
      return x_.y[c] >= room_ && !open_.without(closed).empty() ? kMostTransferTokens - x_.y[c] : int64_t{-1};
    });
    if (at == n) return false;
    const int c = g_.rank_replica[begin + at], e = g_.replica_expert[c];
    const Set closed = Set::read(x_.closed + kWords * e), to = open_.without(closed);
    const int64_t wanted = joint::most(joint::least(x_.load[r] - cap, x_.y[c]), room_);
    constexpr int64_t kTooSmall = int64_t{1} << 54;  // a larger value than any room that fits
    const int j = first_least(warp_, p_.n_ranks, [&](int i) {
      if (!to.has(i)) return int64_t{-1};
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

  // A guest on a rank `via` that has a free slot, and no room: it passes on as many tokens of its own to one that
  // relieves it already, whose rank has room but no slot. False where there is none.
  LPLB_HD bool pass_on(int r, int64_t cap) {
    const int begin = g_.rank_begin[r], n = g_.rank_begin[r + 1] - begin;
    const auto next_of = [&](int via) {  // what `via` can pass on to, and how much
      Spill best{-1, -1, 0};
      LPLB_LOOP
      for (int i = 0; i < n_spills_; ++i) {
        const Spill& spill = x_.spills[i];
        if (g_.replica_rank[spill.copy] != via || spill.rank == r) continue;
        const int64_t tokens = joint::least(cap - x_.load[spill.rank], x_.y[spill.copy]);
        if (tokens > best.tokens) best = {i, spill.rank, tokens};
      }
      return best;
    };
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
    const int via = first_least(warp_, p_.n_ranks, [&](int i) {
      if (i == r || x_.load[i] > cap || x_.used[i] >= p_.n_slots) return int64_t{-1};
      const int c = copy_for(i);
      if (c < 0) return int64_t{-1};
      const int64_t tokens = joint::least(joint::least(excess, x_.y[c]), next_of(i).tokens);
      return tokens >= room_ ? kMostTransferTokens - tokens : int64_t{-1};
    });
    if (via == p_.n_ranks) return false;
    const int c = copy_for(via);
    const Spill next = next_of(via);
    const int64_t tokens = joint::least(joint::least(excess, x_.y[c]), next.tokens);
    warp_.sync();  // everybody has read them
    if (warp_.rank() == 0) {
      Spill& spill = x_.spills[next.copy];
      x_.y[spill.copy] -= tokens;
      spill.tokens += tokens;
      x_.load[next.rank] += tokens;
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
    return true;
  }

  // The fewest transfers of several tries, of which the plan is left; most + 1 where none of them does.
  LPLB_HD int attempt(int64_t cap, int most) {
    int best = most + 1;
    for (int gathered = 0; gathered < (g_.shared ? 2 : 1); ++gathered) {
      const int over = relieve_to(cap, gathered != 0);  // every one of them takes a transfer at least
      for (int order = 0; order < 2 && over < best; ++order) {
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

  Warp& warp_;
  const TransferProblem& p_;
  const JointRules& rules_;
  const TransferBatch& batch_;
  JointSpace x_;
  CopyTables g_;
  int64_t room_;  // what a guest must have at least
  joint::Level bound_{0, 1};
  int most_ = 0, n_spills_ = 0;
  Set open_ = Set::none();  // ranks that take guests
};

}  // namespace LPLB_ISA
}  // namespace lplb
