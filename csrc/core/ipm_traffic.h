// The interior point of ipm.h with a cost on traffic: on tokens from beyond what a replica's rank and node hold.
//
//     of each replica p               y_p = own_p + rest_p,         own_p ≤ tokens of e on p's rank
//     of each node k of an expert e   Σ_{p on k} y_p = near_k + far_k,   near_k ≤ tokens of e on k's ranks
//     minimise t + κλ Σ rest_p + (1-κ)λ Σ far_k with all parts ≥ 0, and in all else as in ipm.h
//
// That is the least traffic that y allows: far_k tokens cross nodes, at λ, and near_k - Σ own_p cross ranks, at κλ.
//
//     duals   π_k free;   z_i ≥ 0 of every part x_i ≥ 0;   w_i ≥ 0 of the room b_i - x_i ≥ 0 of own and near parts
//
//             own    u_r + m_e + π_k = z - w              near   -π_k = z - w
//             rest   u_r + m_e + π_k + κλ = z             far    (1-κ)λ - π_k = z
//
// Rest and far parts, and ranks with their slack, are pairs (y, z) like those of ipm.h. A bounded part is two pairs,
// (x, z) and (k, w) with its room k. With D the step of the left side above, E and F the second-order terms of x·z and
// k·w, and N = z·k + w·x, its Newton step is
//
//     dx = (x·k·(w - z - D) + k·E - x·F)/N,   dz = (z·k·D - z·w·b + w·E + z·F)/N,   dw = dz - D
//
// So for a replica y + dy = T_p - h_p·(du_r + dm_e + dπ_k), its own part adding x·k/N to h_p and (x·w·b + k·E - x·F)/N
// to T_p, the rest y/z and E/z; and for a node near + far = G_k + H_k·dπ_k, made likewise. That the two are equal
// gives, with S_k = Σ h_p,
//
//     dπ_k = (Σ T_p - G_k - Σ h_p (du_r + dm_e)) / (S_k + H_k)
//
// and without nodes the equations are those of ipm.h, with h_p·H_k/(S_k + H_k) for y/z and T_p - h_p (Σ T_p - G_k)/(S_k
// + H_k) for `extra`, but for M: two replicas on one node have -h_p·h_q/(S_k + H_k) more in common, a Laplacian as
// well.
//
// Parts with b = 0 stay at x = k = 0, z = w = 1 and take no steps; nor do those of experts without tokens.
#pragma once

#include "ipm.h"
#include "traffic.h"

namespace lplb {
inline namespace LPLB_ISA {

struct TrafficOutcome {
  IpmOutcome ipm;   // with costs
  double max_load;  // of ranks, scaled, without
};

namespace traffic {

inline constexpr double kStartPrice = 0.9;  // see start(): bounded parts start cheap

// f(node, end) for every node of expert e: its replicas are node … end - 1, as slots ascend and with them ranks.
template <class AnyGroup, class F>
LPLB_HD inline void each_node(const AnyGroup& g, const TrafficSpace& f, int e, F use) {
  LPLB_LOOP
  for (int node = g.expert_begin[e]; node < g.expert_begin[e + 1]; node = f.node_end[node]) use(node, f.node_end[node]);
}

// The tokens of an expert on the ranks of node k.
LPLB_HD inline int64_t node_tokens(const Traffic& t, int k, int logical) {
  const int begin = k * t.ranks_per_node;
  const int end = begin + t.ranks_per_node < t.n_ranks ? begin + t.ranks_per_node : t.n_ranks;
  int64_t tokens = 0;
  in_order<4>(
      begin, end, [&](int r) { return t.counts[r * t.stride + logical]; }, [&](int, int32_t n) { tokens += n; });
  return tokens;
}

// Nodes, and scaled bounds.
template <class Team, class AnyGroup>
LPLB_HD inline void find_bounds(Team& team, const AnyGroup& g, const TrafficSpace& f, const Traffic& t,
                                double inv_mean) {
  team.each(g.n_experts, [&](int e) {
    const int logical = g.expert_logical[e];
    int node = 0, k = -1;
    LPLB_LOOP
    for (int p = g.expert_begin[e]; p < g.expert_begin[e + 1]; ++p) {
      const int rank = g.first_rank + g.replica_rank[p];
      f.bound[p] = static_cast<double>(t.counts[rank * t.stride + logical]) * inv_mean;
      f.bound[g.n_replicas + p] = 0.0;
      if (rank / t.ranks_per_node != k) {
        node = p;
        k = rank / t.ranks_per_node;
        f.bound[g.n_replicas + p] = static_cast<double>(node_tokens(t, k, logical)) * inv_mean;
      }
      f.node_begin[p] = node;
      f.node_end[node] = p + 1;
    }
  });
  team.sync();
}

// The pairs, with what is theirs in h and extra.
LPLB_HD inline Workspace pairs_of(const Workspace& x, const TrafficSpace& f) {
  Workspace pairs = x;
  pairs.y = f.y;
  pairs.z = f.pair_z;
  pairs.dz = f.pair_dz;
  pairs.h = f.h;
  pairs.extra = pairs.inv_z = f.extra;
  return pairs;
}

LPLB_HD inline void start_bounded(const TrafficSpace& f, int i, double part, double reduced_cost, double u0) {
  const bool on = f.bound[i] > 0.0;
  f.x[i] = on ? part : 0.0;
  f.k[i] = f.bound[i] - f.x[i];
  f.z[i] = on ? u0 + (reduced_cost > 0.0 ? reduced_cost : 0.0) : 1.0;
  f.w[i] = on ? u0 - (reduced_cost < 0.0 ? reduced_cost : 0.0) : 1.0;
}

LPLB_HD inline double smaller(double a, double b) { return a < b ? a : b; }

// An expert's tokens go to its ranks by speed, which starts well from speeds of any spread, and half of them to bounded
// parts that have twice the room. u = 1/Σv; π_k and m_e such that what the table above has on its left is u and the
// part's cost, less kStartPrice of its unbounded fellow's. Returns t.
template <class Team, class AnyGroup>
LPLB_HD inline double start(Team& team, const AnyGroup& g, const Workspace& x, const TrafficSpace& f, double lambda) {
  const double u0 = 1.0 / team.few_sums(g.n_ranks, [&](int r) { return g.speed[r]; })[0];
  const double rest_cost = kNodeCost * lambda, far_cost = (1.0 - kNodeCost) * lambda;
  const int n = g.n_replicas, first_node = n + g.n_ranks;
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
    double speed = 0.0;
    in_order<4>(begin, end, [&](int p) { return g.speed[g.replica_rank[p]]; }, [&](int, double v) { speed += v; });
    const double share = x.w[e] / speed;
    in_order<4>(
        begin, end, [&](int p) { return g.speed[g.replica_rank[p]]; },
        [&](int p, double v) {
          f.y[p] = share * v;
          f.pair_z[p] = share > 0.0 ? u0 + (1.0 - kStartPrice) * rest_cost : 1.0;
          f.pair_dz[p] = 0.0;
          f.y[first_node + p] = f.pair_dz[first_node + p] = 0.0;
          f.pair_z[first_node + p] = 1.0;
          start_bounded(f, n + p, 0.0, 0.0, u0);
        });
    each_node(g, f, e, [&](int node, int node_end) {
      double tokens = 0.0;
      in_order<4>(node, node_end, [&](int p) { return f.y[p]; }, [&](int, double y) { tokens += y; });
      const double near = 0.5 * smaller(f.bound[n + node], tokens);
      start_bounded(f, n + node, near, u0 - kStartPrice * far_cost, u0);
      f.y[first_node + node] = tokens - near;
      if (tokens > 0.0) f.pair_z[first_node + node] = u0 + (1.0 - kStartPrice) * far_cost;
    });
  });
  team.sync();
  const double t = ipm::start_ranks(team, g, x, u0);
  team.each(n, [&](int p) {
    const double own = 0.5 * smaller(f.bound[p], f.y[p]);
    start_bounded(f, p, own, u0 - kStartPrice * rest_cost, u0);
    f.y[p] -= own;
  });
  team.sync();
  return t;
}

// The least Σ u_r y_p + cost over all y of expert e. On a node all but own tokens take the rank with the least u. So
// tokens can be had, by price, at u_r up to own_p's bound where that is less; at the node's least u + κλ up to what is
// left of near_k's bound; at the least u + λ without end. Filling up the cheapest first ends at some price, and gives
// max over π of π·w_e - Σ b·max(0, π - price of b): π falls from the last price until no more is held than w_e.
template <class AnyGroup>
LPLB_HD inline double least_cost(const AnyGroup& g, const Workspace& x, const TrafficSpace& f, int e, double lambda) {
  const double* u = f.pair_z + g.n_replicas;
  const auto least_u = [&](int begin, int end) {
    double least = u[g.replica_rank[begin]];
    in_order<4>(
        begin + 1, end, [&](int p) { return u[g.replica_rank[p]]; },
        [&](int, double up) { least = smaller(up, least); });
    return least;
  };
  double price = least_u(g.expert_begin[e], g.expert_begin[e + 1]) + lambda;
  for (;;) {
    double held = 0.0, saved = 0.0, next = 0.0;  // by what is below the price; the largest price below it
    const auto add = [&](double cost, double bound) {
      if (!(cost < price)) return;
      held += bound;
      saved += bound * (price - cost);
      next = cost > next ? cost : next;
    };
    each_node(g, f, e, [&](int node, int end) {
      const double near_cost = least_u(node, end) + kNodeCost * lambda;
      double near = f.bound[g.n_replicas + node];
      in_order<4>(
          node, end, [&](int p) { return u[g.replica_rank[p]]; },
          [&](int p, double up) {
            if (!(up < near_cost)) return;
            add(up, f.bound[p]);
            near -= f.bound[p];
          });
      add(near_cost, near > 0.0 ? near : 0.0);
    });
    if (!(held > x.w[e])) return price * x.w[e] - saved;
    price = next;
  }
}

// Σ u_r a_r + Σ_e least_cost(e), for u scaled to Σ v_r u_r = 1: a lower bound whatever u ≥ 0 is, because any feasible t
// and y have t + cost ≥ Σ u_r (a_r + Σ_{p on r} y_p) + cost = Σ u_r a_r + Σ_e (Σ u_r y_p + cost of e).
template <class Team, class AnyGroup>
LPLB_HD inline double lower_bound(Team& team, const AnyGroup& g, const Workspace& x, const TrafficSpace& f,
                                  double lambda) {
  const double* u = f.pair_z + g.n_replicas;
  const auto ranks =
      team.few_sums(g.n_ranks, [&](int r) { return u[r] * x.a[r]; }, [&](int r) { return g.speed[r] * u[r]; });
  const auto experts = team.sums(g.n_experts, [&](int e) { return least_cost(g, x, f, e, lambda * ranks[1]); });
  return (ranks[0] + experts[0]) / ranks[1];
}

// 1/N; h of pairs and replicas; 1/(S + H); and h of replicas with their nodes eliminated, into x.
template <class Team, class AnyGroup>
LPLB_HD inline void scale(Team& team, const AnyGroup& g, const Workspace& x, const Workspace& pairs,
                          const TrafficSpace& f) {
  const int n = g.n_replicas, first_node = n + g.n_ranks;
  team.each(2 * n, [f](int i) {
    const double inv = 1.0 / (f.z[i] * f.k[i] + f.w[i] * f.x[i]);
    f.inv_n[i] = f.bound[i] > 0.0 ? inv : 0.0;
  });
  ipm::scale_pairs(team, g, n_traffic_pairs(g), pairs);
  team.each(n, [f](int p) { f.replica_h[p] = f.h[p] + f.x[p] * f.k[p] * f.inv_n[p]; });
  team.each(g.n_ranks, [=](int r) { x.h[n + r] = f.h[n + r]; });
  team.sync();
  team.each(g.n_experts, [&](int e) {
    each_node(g, f, e, [&](int node, int end) {
      const int i = n + node;
      const double of_node = f.h[first_node + node] + f.x[i] * f.k[i] * f.inv_n[i];
      double of_both = of_node;
      in_order<4>(node, end, [&](int p) { return f.replica_h[p]; }, [&](int, double h) { of_both += h; });
      f.inv_node[node] = of_both > 0.0 ? 1.0 / of_both : 0.0;
      const double share = of_node * f.inv_node[node];
      in_order<4>(node, end, [&](int p) { return f.replica_h[p]; }, [&](int p, double h) { x.h[p] = h * share; });
    });
  });
  team.sync();
}

// What stands for `extra` in x, and Σ T_p - G_k.
template <bool kCorrect, class Team, class AnyGroup>
LPLB_HD inline void find_targets(Team& team, const AnyGroup& g, const Workspace& x, const TrafficSpace& f) {
  const int n = g.n_replicas, first_node = n + g.n_ranks;
  const auto target = [=](int i, int pair) {
    const double affine = f.x[i] * f.w[i] * f.bound[i];
    if (!kCorrect) return affine * f.inv_n[i];
    return (affine + (f.k[i] * f.e[i] - f.x[i] * f.f[i])) * f.inv_n[i] + f.extra[pair];
  };
  team.each(g.n_experts, [&](int e) {
    each_node(g, f, e, [&](int node, int end) {
      double excess = -target(n + node, first_node + node);
      for (int p = node; p < end; ++p) {
        x.extra[p] = target(p, p);
        excess += x.extra[p];
      }
      f.excess[node] = excess;
      const double share = excess * f.inv_node[node];
      in_order<4>(node, end, [&](int p) { return f.replica_h[p]; }, [&](int p, double h) { x.extra[p] -= h * share; });
    });
  });
  team.each(g.n_ranks, [=](int r) { x.extra[n + r] = kCorrect ? f.extra[n + r] : 0.0; });
  team.sync();
}

// Adds to M what replicas on the same node have in common; see assemble() in ipm.h.
template <class Team, class AnyGroup>
LPLB_HD inline void assemble_nodes(Team& team, const AnyGroup& g, const Workspace& x, const TrafficSpace& f) {
  const int width = g.n_padded;
  team.each(g.n_ranks, [&](int r) {
    double diagonal = x.m[r * width + r];
    LPLB_LOOP
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int p = g.rank_replica[i], node = f.node_begin[p], end = f.node_end[node];
      if (end - node == 1) continue;
      const double factor = f.replica_h[p] * f.inv_node[node];
      double others = 0.0;
      LPLB_LOOP
      for (int q = node; q < end; ++q) {
        if (q == p) continue;
        others += f.replica_h[q];
        if (q < p) x.m[g.replica_rank[q] * width + r] -= factor * f.replica_h[q];
      }
      diagonal += factor * others;
    }
    x.m[r * width + r] = diagonal;
  });
  team.sync();
}

// From du_r + dm_e, which complete_step() of ipm.h left in dz of the replicas, to the steps of all parts.
template <bool kCorrect, class Team, class AnyGroup>
LPLB_HD inline void find_steps(Team& team, const AnyGroup& g, const TrafficSpace& f) {
  const int n = g.n_replicas, first_node = n + g.n_ranks;
  team.each(g.n_experts, [&](int e) {
    each_node(g, f, e, [&](int node, int end) {
      double excess = f.excess[node];
      in_order<4>(
          node, end, [&](int p) { return f.replica_h[p] * f.pair_dz[p]; },
          [&](int, double product) { excess -= product; });
      const double dpi = excess * f.inv_node[node];
      for (int p = node; p < end; ++p) f.pair_dz[p] += dpi;
      f.pair_dz[first_node + node] = -dpi;
    });
  });
  team.sync();
  for (int half = 0; half < 2; ++half) {  // replicas, nodes
    const int first = half * n, first_pair = half * first_node;
    team.each(n, [=](int p) {
      const int i = first + p;
      const double part = f.x[i], k = f.k[i], z = f.z[i], w = f.w[i], inv = f.inv_n[i], d = f.pair_dz[first_pair + p];
      double dx = part * k * (w - z - d), both = -(z * w * f.bound[i]);
      if (kCorrect) {
        dx += k * f.e[i] - part * f.f[i];
        both += w * f.e[i] + z * f.f[i];
      }
      f.dx[i] = dx * inv;
      f.dz[i] = (both + z * k * d) * inv;
      f.dw[i] = (both - w * part * d) * inv;
    });
  }
  team.sync();
}

// Second-order terms of all products, centred on sigma_mu.
template <class Team, class AnyGroup>
LPLB_HD inline void correct(Team& team, const AnyGroup& g, const Workspace& pairs, const TrafficSpace& f,
                            double sigma_mu) {
  team.each(2 * g.n_replicas, [f, sigma_mu](int i) {
    f.e[i] = sigma_mu - f.dx[i] * f.dz[i];
    f.f[i] = sigma_mu + f.dx[i] * f.dw[i];
  });
  ipm::correct_pairs(team, n_traffic_pairs(g), pairs, sigma_mu);
}

// The longest steps that go `share` of the way to where the first x, k, z or w becomes negative. Parts with b = 0 give
// NaN, which is passed over.
template <class Team, class AnyGroup>
LPLB_HD inline ipm::Steps bounded_steps(Team& team, const AnyGroup& g, const TrafficSpace& f, double share) {
  const auto primal = team.maxima(
      2 * g.n_replicas, [f](int i) { return -f.dx[i] * (1.0 / f.x[i]); },
      [f](int i) { return f.dx[i] * (1.0 / f.k[i]); });
  const auto dual = team.maxima(
      2 * g.n_replicas, [f](int i) { return -f.dz[i] * (1.0 / f.z[i]); },
      [f](int i) { return -f.dw[i] * (1.0 / f.w[i]); });
  return ipm::within(share, {{primal[0] > primal[1] ? primal[0] : primal[1], dual[0] > dual[1] ? dual[0] : dual[1]}});
}

LPLB_HD inline ipm::Steps shorter(ipm::Steps a, ipm::Steps b) {
  return {smaller(a.primal, b.primal), smaller(a.dual, b.dual)};
}

// Σ x·z + Σ k·w of the bounded parts after the given steps.
template <class Team, class AnyGroup>
LPLB_HD inline double complementarity(Team& team, const AnyGroup& g, const TrafficSpace& f, ipm::Steps a) {
  return team.sums(2 * g.n_replicas, [f, a](int i) {
    const double dx = a.primal * f.dx[i];
    return (f.x[i] + dx) * (f.z[i] + a.dual * f.dz[i]) + (f.k[i] - dx) * (f.w[i] + a.dual * f.dw[i]);
  })[0];
}

template <class Team, class AnyGroup>
LPLB_HD inline void advance(Team& team, const AnyGroup& g, const Workspace& pairs, const TrafficSpace& f,
                            ipm::Steps a) {
  team.sync();  // everybody has read the old point
  team.each(2 * g.n_replicas, [f, a](int i) {
    f.x[i] += a.primal * f.dx[i];
    f.k[i] -= a.primal * f.dx[i];
    f.z[i] += a.dual * f.dz[i];
    f.w[i] += a.dual * f.dw[i];
  });
  ipm::advance(team, n_traffic_pairs(g), pairs, a);
}

// How many pairs there are, and Σ of their products.
template <class Team, class AnyGroup>
LPLB_HD inline Values<2> count_pairs(Team& team, const AnyGroup& g, const TrafficSpace& f) {
  const auto pairs = team.sums(
      n_traffic_pairs(g), [f](int i) { return f.y[i] > 0.0 ? 1.0 : 0.0; }, [f](int i) { return f.y[i] * f.pair_z[i]; });
  const auto bounded = team.sums(
      2 * g.n_replicas, [f](int i) { return f.bound[i] > 0.0 ? 2.0 : 0.0; },
      [f](int i) { return f.x[i] * f.z[i] + f.k[i] * f.w[i]; });
  return {{pairs[0] + bounded[0], pairs[1] + bounded[1]}};
}

}  // namespace traffic

// Leaves the fractional split, scaled, in y. lambda: the cost of a scaled token that crosses nodes. σ is (μ_aff/μ)²
// here: with the cube of ipm.h most loads take a tenth of an iteration less, but the hardest one or two more.
template <class Team, class Algebra, class AnyGroup>
LPLB_HD inline TrafficOutcome interior_point_with_traffic(Team& team, Algebra algebra, const AnyGroup& g,
                                                          const Workspace& space, const TrafficSpace& f, double lambda,
                                                          IterationRow* log) {
  const int n = g.n_replicas, n_pairs = n_traffic_pairs(g), first_node = n + g.n_ranks;
  const Workspace pairs = traffic::pairs_of(space, f);
  Workspace x = pairs;  // as the functions of ipm.h want it
  x.h = space.h;
  x.extra = space.extra;
  double t = traffic::start(team, g, x, f, lambda);
  const Values<2> at_start = traffic::count_pairs(team, g, f);
  const double inv_n_on = 1.0 / at_start[0];
  double mu = at_start[1] * inv_n_on;
  TrafficOutcome result{{0.0, 0.0, 0, Status::iteration_limit}, 0.0};
  IpmOutcome& out = result.ipm;

  for (;; ++out.iterations) {
    result.max_load = team.few_maxima(g.n_ranks, [&](int r) { return t - f.y[n + r] * g.inv_speed[r]; })[0];
    const auto tokens = team.sums(n, [=](int p) { return f.y[p]; }, [=](int p) { return f.y[first_node + p]; });
    out.objective = result.max_load + lambda * (kNodeCost * tokens[0] + (1.0 - kNodeCost) * tokens[1]);
    const double bound = traffic::lower_bound(team, g, x, f, lambda);
    out.bound = bound > out.bound ? bound : out.bound;
    const double distance = out.objective - out.bound;
    if (log != nullptr && team.rank() == 0)
      log[out.iterations] = {out.objective, out.bound, distance / out.bound, mu, 0.0, 0.0};
    if (distance <= kGapTolerance * out.bound) {
      out.status = Status::solved;
      break;
    }
    if (out.iterations == kMaxIterations) break;

    traffic::scale(team, g, x, pairs, f);
    traffic::find_targets<false>(team, g, x, f);
    ipm::scale_experts(team, g, x);
    ipm::assemble(team, g, x);
    traffic::assemble_nodes(team, g, x, f);
    ipm::carry_extra(team, g, x);
    if (!algebra.template factor_and_solve<2>(team, g.n_padded, x.m, x.inv_d, x.rhs)) {
      out.status = Status::numerical;
      break;
    }
    const double inv_v_x1 = 1.0 / team.few_sums(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[r]; })[0];

    ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<true>(team, g, x);
    traffic::find_steps<false>(team, g, f);
    const ipm::Steps affine =
        traffic::shorter(ipm::affine_steps(team, n_pairs, pairs), traffic::bounded_steps(team, g, f, 1.0));
    const double mu_affine =
        (ipm::complementarity<false>(team, n_pairs, pairs, affine) + traffic::complementarity(team, g, f, affine)) *
        inv_n_on;
    const double ratio = mu_affine / mu;

    traffic::correct(team, g, pairs, f, ratio * ratio * mu);
    traffic::find_targets<true>(team, g, x, f);
    ipm::carry_extra(team, g, x);
    algebra.solve(team, g.n_padded, x.m, x.inv_d, x.rhs + g.n_padded);
    const double t_new = ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<true>(team, g, x);
    traffic::find_steps<true>(team, g, f);
    const ipm::Steps a = traffic::shorter(ipm::corrected_steps(team, n_pairs, pairs),
                                          traffic::bounded_steps(team, g, f, kStepToBoundary));
    const double mu_new =
        (ipm::complementarity<true>(team, n_pairs, pairs, a) + traffic::complementarity(team, g, f, a)) * inv_n_on;
    if (!(mu_new > 0.0 && mu_new < 1e300)) {  // not a number, or nothing left to improve: keep what is there
      out.status = Status::numerical;
      break;
    }
    traffic::advance(team, g, pairs, f, a);
    t += a.primal * (t_new - t);
    mu = mu_new;
    if (log != nullptr && team.rank() == 0) {
      log[out.iterations].step_primal = a.primal;
      log[out.iterations].step_dual = a.dual;
    }
  }
  team.each(n, [=](int p) { space.y[p] = f.y[p] + f.x[p]; });
  team.sync();
  return result;
}

}  // namespace LPLB_ISA
}  // namespace lplb
