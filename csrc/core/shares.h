// How one source rank's tokens of an expert share out its quotas (design.md §4): a weight for every copy and the number
// of the source's first token, from which split.h's nested proportion goes on. The sources' shares add up to the
// quotas.
//
// Weights are good for other batches, too: they are proportions, and where the source had no token of the expert they
// are the quotas themselves, or, where nobody had one, those of the fixed split.
#pragma once

#include "problem.h"

namespace lplb {
inline namespace LPLB_ISA {

template <class Count>
LPLB_HD inline int64_t tokens_of(const BasicSources<Count>& from, int r, int e) {
  return from.first[r * from.stride + e];
}
template <class Count>
LPLB_HD inline int node_of(const BasicSources<Count>& from, int r) {
  return r / from.ranks_per_node;
}
template <class Count>
LPLB_HD inline int node_begin(const BasicSources<Count>& from, int node) {
  return node * from.ranks_per_node;
}
template <class Count>
LPLB_HD inline int node_end(const BasicSources<Count>& from, int node) {
  const int end = (node + 1) * from.ranks_per_node;
  return end < from.n_ranks ? end : from.n_ranks;
}

// The copies of one expert in slot order, at most one on each rank. quotas [n_physical] are the plan's. What follows
// takes anything for copies that has its members but slot and slots_per_rank: ranges.h has another.
struct Copies {
  int expert, n;
  const int32_t* slot;  // [n]
  const int32_t* quotas;
  int slots_per_rank;

  LPLB_HD int rank(int i) const { return slot[i] / slots_per_rank; }
  LPLB_HD int64_t quota(int i) const { return quotas[slot[i]]; }
};

namespace shares {

LPLB_HD inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LPLB_HD inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Interval {
  int64_t begin, end;
  LPLB_HD int64_t length() const { return end > begin ? end - begin : 0; }
  LPLB_HD Interval within(Interval o) const { return {most(begin, o.begin), least(end, o.end)}; }
  LPLB_HD Interval moved(int64_t by) const { return {begin + by, end + by}; }
};

// What a node's own tokens leave of themselves and of its copies' quotas, once every copy took those of its own rank.
struct Node {
  int64_t tokens, room;
  int copies_end;  // behind its last copy
  LPLB_HD int64_t near() const { return least(tokens, room); }
};

// What copy i takes of its own rank's tokens.
template <class From, class Of>
LPLB_HD inline int64_t kept(const From& from, const Of& of, int i) {
  return least(tokens_of(from, of.rank(i), of.expert), of.quota(i));
}

// copies_begin: the node's first copy, or a later node's.
template <class From, class Of>
LPLB_HD inline Node node_at(const From& from, const Of& of, int node, int copies_begin) {
  Node out{0, 0, copies_begin};
  const int end = node_end(from, node);
  LPLB_UNROLL_16
  for (int r = node_begin(from, node); r < end; ++r) out.tokens += tokens_of(from, r, of.expert);
  for (int& i = out.copies_end; i < of.n && of.rank(i) < end; ++i) {
    const int64_t own = kept(from, of, i);
    out.tokens -= own;
    out.room += of.quota(i) - own;
  }
  return out;
}

}  // namespace shares

// The fixed split, for tokens that no plan speaks of: the copy on the source's rank; else those of its node; else all;
// the same weight each. Sources begin at different copies.
template <class From, class Of>
struct FixedShares {
  const From& from;
  const Of& of;
  int source;
  bool on_rank = false, on_node = false;

  LPLB_HD FixedShares(const From& from, const Of& of, int source) : from(from), of(of), source(source) {
    for (int i = 0; i < of.n && from.ranks_per_node > 0; ++i) {
      on_rank = on_rank || of.rank(i) == source;
      on_node = on_node || node_of(from, of.rank(i)) == node_of(from, source);
    }
  }
  LPLB_HD int64_t first_token() const { return source; }
  LPLB_HD int64_t weight(int i) const {
    const int r = of.rank(i);
    return !on_node || (on_rank ? r == source : node_of(from, r) == node_of(from, source)) ? 1 : 0;
  }
  // put(i, weight) for every copy. Returns the number of the first token.
  template <class Put>
  LPLB_HD int64_t put_all(Put put) const {
    for (int i = 0; i < of.n; ++i) put(i, weight(i));
    return first_token();
  }
};

// All sources' tokens of an expert by the fixed split: add(i, tokens), what a source sends to copy i. A source's token
// k of n goes to copy j of its m where nested proportion takes it there: ⌊(first + n + j)/m⌋ - ⌊(first + j)/m⌋ of them.
template <class Add>
LPLB_HD inline void add_fixed_shares(const Sources& from, const Copies& of, Add add) {
  int node_end = 0, first = 0, last = 0;  // copies of the source's node; none where it has no node
  LPLB_LOOP
  for (int r = 0; r < from.n_ranks; ++r) {
    if (from.ranks_per_node > 0 && r == node_end) {
      node_end += from.ranks_per_node;
      for (first = last; last < of.n && of.rank(last) < node_end;) ++last;
    }
    const auto tokens = static_cast<uint32_t>(tokens_of(from, r, of.expert));
    if (tokens == 0) continue;
    int begin = first, end = last;
    for (int i = first; i < last; ++i)
      if (of.rank(i) == r) begin = i, end = i + 1;
    if (begin == end) begin = 0, end = of.n;
    const auto m = static_cast<uint32_t>(end - begin);
    const uint32_t each = tokens / m, rest = tokens % m;
    uint32_t at = static_cast<uint32_t>(r) % m;
    for (int i = begin; i < end; ++i) {
      add(i, each + (at + rest >= m ? 1 : 0));
      at = at + 1 == m ? 0 : at + 1;
    }
  }
}

// The quotas add up to the sources' tokens. put(i, weight) is called once for every copy. Returns the number of the
// source's first token.
//
// Where a node's tokens are more than its copies take, or the other way round, both are numbered, tokens by source and
// room by copy, and meet in that order; what is left meets in the same way over all nodes.
template <class From, class Of, class Put>
LPLB_HD inline int64_t own_shares(const From& from, const Of& of, int source, Split split, Put put) {
  using shares::Interval;
  int64_t all = 0;
  for (int i = 0; i < of.n; ++i) all += of.quota(i);
  if (all == 0) return FixedShares(from, of, source).put_all(put);
  const int64_t own = tokens_of(from, source, of.expert);
  if (split == Split::plain || own == 0 || from.ranks_per_node == 0) {
    for (int i = 0; i < of.n; ++i) put(i, of.quota(i));
    int64_t before = 0;
    for (int r = 0; r < source; ++r) before += tokens_of(from, r, of.expert);
    return before;
  }

  const int home = node_of(from, source);
  int64_t far_before = 0;  // tokens of earlier nodes that leave their node
  int i = 0;
  for (int node = 0; node < home; ++node) {
    const shares::Node there = shares::node_at(from, of, node, i);
    far_before += there.tokens - there.near();
    i = there.copies_end;
  }
  const int home_copies = i;
  int64_t rank_before = 0;  // tokens of the node's earlier ranks that leave their rank
  for (int r = node_begin(from, home); r < source; ++r) rank_before += tokens_of(from, r, of.expert);
  for (; i < of.n && of.rank(i) < source; ++i) rank_before -= shares::kept(from, of, i);
  const int64_t stays = i < of.n && of.rank(i) == source ? shares::kept(from, of, i) : 0;
  const Interval mine{rank_before, rank_before + own - stays};
  const int64_t near = shares::node_at(from, of, home, home_copies).near();
  const Interval leaving =
      Interval{shares::most(mine.begin, near), shares::most(mine.end, near)}.moved(far_before - near);

  int64_t room_before = 0;  // of earlier nodes, for tokens of other nodes
  for (int c = 0; c < of.n;) {
    const int node = node_of(from, of.rank(c));
    const shares::Node there = shares::node_at(from, of, node, c);
    int64_t room = 0;  // of the node's earlier copies
    for (; c < there.copies_end; ++c) {
      const int64_t taken = shares::kept(from, of, c);
      const Interval open{room, room + of.quota(c) - taken};
      room = open.end;
      int64_t weight = of.rank(c) == source ? taken : 0;
      if (node == home) weight += open.within(mine).within({0, there.near()}).length();
      const Interval rest{shares::most(open.begin, there.near()), shares::most(open.end, there.near())};
      weight += rest.moved(room_before - there.near()).within(leaving).length();
      put(c, weight);
    }
    room_before += there.room - there.near();
  }
  return 0;
}

// How many of the tokens first … first + n - 1 go to each copy under these weights, not all zero: put(i, tokens).
template <class Weight, class Put>
LPLB_HD inline void spread(int64_t first, int64_t n, int n_copies, Weight weight, Put put) {
  uint64_t begin = static_cast<uint64_t>(first), end = begin + static_cast<uint64_t>(n), left = 0;
  for (int i = 0; i < n_copies; ++i) left += static_cast<uint64_t>(weight(i));
  for (int i = 0; i < n_copies; ++i) {
    const auto w = static_cast<uint64_t>(weight(i));
    const uint64_t b = left > 0 ? begin * w / left : begin, e = left > 0 ? end * w / left : end;
    put(i, static_cast<int64_t>(e - b));
    begin -= b;
    end -= e;
    left -= w;
  }
}

}  // namespace LPLB_ISA
}  // namespace lplb
