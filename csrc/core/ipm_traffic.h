// The interior point of ipm.h with a cost on traffic: tokens that a replica gets from beyond its own rank.
//
//     minimise t + Σ c_i x_i   over the parts i of the replicas:   y_p = Σ_{i of p} x_i,   0 ≤ x_i ≤ b_i,
//                              and in all else as in ipm.h
//
// A replica p of e on rank r has three parts:   own    b = tokens of e on r                       c = 0
//                                               node   b = tokens of e on the node's other ranks  c = κ·λ
//                                               far    without bound                              c = λ
//
//     duals        z_i ≥ 0 of x_i ≥ 0,   w_i ≥ 0 of the room k_i = b_i - x_i ≥ 0,   u_{r(p)} + m_e + c_i = z_i - w_i
//
// Far parts, and ranks with their slack, are the pairs (y, z) of ipm.h. A bounded part is two pairs, (x, z) and (k, w).
// With D = du_r + dm_e, E and F the second-order terms of x·z and k·w, and N = z·k + w·x, its Newton step is
//
//     dx = (x·k·(w - z - D) + k·E - x·F)/N,   dz = (z·k·D - z·w·b + w·E + z·F)/N,   dw = dz - D
//
// so that y_p + dy_p = T_p - h_p·D with h_p = Σ x·k/N (+ y/z, far) and T_p = Σ (x·w·b + k·E - x·F)/N (+ E/z, far). M is
// made of h_p and the right-hand sides of T_p just as ipm.h makes them of y_p/z_p and `extra`: its functions are used.
// Parts with b = 0 stay at x = k = 0, z = w = 1 and take no steps, as do the replicas of experts without tokens.
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

inline constexpr double kStartPrice = 0.9;  // -m_e at the start, in λ: far parts start dear, own parts cheap

// The tokens of expert `logical` on a node's ranks.
LPLB_HD inline int64_t node_tokens(const Traffic& t, int node, int logical) {
  const int first = node * t.ranks_per_node;
  int last = first + t.ranks_per_node;
  last = last < t.n_ranks ? last : t.n_ranks;
  int64_t tokens = 0;
  in_order<4>(
      first, last, [&](int r) { return t.counts[r * t.stride + logical]; }, [&](int, int32_t n) { tokens += n; });
  return tokens;
}

// b_i, scaled. Replicas of one expert on one node share what they leave of the node's tokens: each gets an equal part.
// That can only overstate traffic, since what one of them does not use another could.
template <class Team, class AnyGroup>
LPLB_HD inline void find_bounds(Team& team, const AnyGroup& g, const Parts& f, const Traffic& t, double inv_mean) {
  double *own = f.bound, *node = f.bound + g.n_replicas;
  team.each(g.n_experts, [&](int e) {
    const int logical = g.expert_logical[e], end = g.expert_begin[e + 1];
    for (int p = g.expert_begin[e], next; p < end; p = next) {  // a node's replicas follow each other
      const int here = (g.first_rank + g.replica_rank[p]) / t.ranks_per_node;
      int64_t left = node_tokens(t, here, logical);
      for (next = p; next < end; ++next) {
        const int rank = g.first_rank + g.replica_rank[next];
        if (rank / t.ranks_per_node != here) break;
        const int64_t tokens = t.counts[rank * t.stride + logical];
        own[next] = static_cast<double>(tokens) * inv_mean;
        left -= tokens;
      }
      const double each = static_cast<double>(left) / (next - p) * inv_mean;
      for (int q = p; q < next; ++q) node[q] = each;
    }
  });
  team.sync();
}

// What replaces h and extra in the pairs of far parts and ranks.
LPLB_HD inline Workspace far_pairs(const Workspace& x, const Parts& f) {
  Workspace pairs = x;
  pairs.h = f.pair_h;
  pairs.extra = pairs.inv_z = f.pair_extra;
  return pairs;
}

LPLB_HD inline void start_part(const Parts& f, int i, double x, double reduced_cost, double u0) {
  const bool on = f.bound[i] > 0.0;
  f.x[i] = x;
  f.k[i] = f.bound[i] - x;
  f.z[i] = on ? u0 + (reduced_cost > 0.0 ? reduced_cost : 0.0) : 1.0;
  f.w[i] = on ? u0 - (reduced_cost < 0.0 ? reduced_cost : 0.0) : 1.0;
}

// The start of ipm.h, the even split dealt to the parts: at most a third to each bounded one, and half of its bound.
template <class Team, class AnyGroup>
LPLB_HD inline double start(Team& team, const AnyGroup& g, const Workspace& x, const Parts& f, double lambda) {
  const double t = ipm::start(team, g, x);
  const double u0 = x.z[g.n_replicas], cost = u0 - kStartPrice * lambda;  // of an own part: u_r + m_e
  const int n = g.n_replicas;
  team.each(n, [=](int p) {
    const double even = x.y[p], third = even / 3.0;
    const double own = 0.5 * f.bound[p] < third ? 0.5 * f.bound[p] : third;
    const double node = 0.5 * f.bound[n + p] < third ? 0.5 * f.bound[n + p] : third;
    start_part(f, p, own, cost, u0);
    start_part(f, n + p, node, cost + kNodeCost * lambda, u0);
    x.y[p] = even - own - node;
    x.z[p] = even > 0.0 ? cost + lambda : 1.0;
  });
  team.sync();
  return t;
}

// The least Σ (u_r + c_i) x_i with Σ x_i = w_e and x_i ≤ b_i over the parts of expert e: it fills the cheapest first,
// up to some price π, and is max over π of π·w_e - Σ b_i·max(0, π - u_r - c_i), as π falls from what far parts cost.
template <class AnyGroup>
LPLB_HD inline double least_cost(const AnyGroup& g, const Workspace& x, const Parts& f, int e, double lambda) {
  const double* u = x.z + g.n_replicas;
  const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
  double price = u[g.replica_rank[begin]];
  in_order<4>(
      begin + 1, end, [&](int p) { return u[g.replica_rank[p]]; },
      [&](int, double up) { price = up < price ? up : price; });
  price += lambda;
  for (;;) {
    double held = 0.0, saved = 0.0, next = 0.0;  // by parts below the price
    const auto add = [&](double cost, double bound) {
      if (!(cost < price)) return;
      held += bound;
      saved += bound * (price - cost);
      next = cost > next ? cost : next;
    };
    LPLB_LOOP
    for (int p = begin; p < end; ++p) {
      const double up = u[g.replica_rank[p]];
      add(up, f.bound[p]);
      add(up + kNodeCost * lambda, f.bound[g.n_replicas + p]);
    }
    if (!(held > x.w[e])) return price * x.w[e] - saved;
    price = next;
  }
}

// Σ u_r a_r + Σ_e least_cost(e), for u scaled to Σ v_r u_r = 1: a lower bound whatever u ≥ 0 is, because any feasible t
// and x have t + Σ c_i x_i ≥ Σ u_r (a_r + Σ_{i on r} x_i) + Σ c_i x_i = Σ u_r a_r + Σ (u_r + c_i) x_i.
template <class Team, class AnyGroup>
LPLB_HD inline double lower_bound(Team& team, const AnyGroup& g, const Workspace& x, const Parts& f, double lambda) {
  const double* u = x.z + g.n_replicas;
  const auto ranks =
      team.few_sums(g.n_ranks, [&](int r) { return u[r] * x.a[r]; }, [&](int r) { return g.speed[r] * u[r]; });
  const auto experts = team.sums(g.n_experts, [&](int e) { return least_cost(g, x, f, e, lambda * ranks[1]); });
  return (ranks[0] + experts[0]) / ranks[1];
}

// 1/N of the parts, and h of the pairs; then h_p = Σ x·k/N + y/z of the replicas, and T_p of the affine step.
template <class Team, class AnyGroup>
LPLB_HD inline void scale(Team& team, const AnyGroup& g, const Workspace& x, const Workspace& pairs, const Parts& f) {
  const int n = g.n_replicas;
  team.each(2 * n, [f](int i) {
    const double inv = 1.0 / (f.z[i] * f.k[i] + f.w[i] * f.x[i]);
    f.inv_n[i] = f.bound[i] > 0.0 ? inv : 0.0;
  });
  ipm::scale_pairs(team, g, pairs);
  team.each(n, [=](int p) {
    const int q = n + p;
    x.h[p] = f.pair_h[p] + f.x[p] * f.k[p] * f.inv_n[p] + f.x[q] * f.k[q] * f.inv_n[q];
    x.extra[p] = f.x[p] * f.w[p] * f.bound[p] * f.inv_n[p] + f.x[q] * f.w[q] * f.bound[q] * f.inv_n[q];
  });
  team.each(g.n_ranks, [=](int r) {
    x.h[n + r] = f.pair_h[n + r];
    x.extra[n + r] = 0.0;
  });
  team.sync();
}

// The steps of all parts that belong to D = dz of the replicas. With kCorrect they carry the second-order terms.
template <bool kCorrect, class Team, class AnyGroup>
LPLB_HD inline void find_steps(Team& team, const AnyGroup& g, const Workspace& x, const Parts& f) {
  const int n = g.n_replicas;
  const auto find = [=](int i, double d) {
    const double xi = f.x[i], k = f.k[i], z = f.z[i], w = f.w[i], inv = f.inv_n[i];
    double dx = xi * k * (w - z - d), both = -(z * w * f.bound[i]);
    if (kCorrect) {
      dx += k * f.e[i] - xi * f.f[i];
      both += w * f.e[i] + z * f.f[i];
    }
    f.dx[i] = dx * inv;
    f.dz[i] = (both + z * k * d) * inv;
    f.dw[i] = (both - w * xi * d) * inv;
  };
  team.each(n, [=](int p) {
    find(p, x.dz[p]);
    find(n + p, x.dz[p]);
  });
  team.sync();
}

// Second-order terms of all products, centred on sigma_mu; and T_p with them.
template <class Team, class AnyGroup>
LPLB_HD inline void correct(Team& team, const AnyGroup& g, const Workspace& x, const Workspace& pairs, const Parts& f,
                            double sigma_mu) {
  const int n = g.n_replicas;
  ipm::correct_pairs(team, g, pairs, sigma_mu);
  const auto correct_part = [=](int i) {
    f.e[i] = sigma_mu - f.dx[i] * f.dz[i];
    f.f[i] = sigma_mu + f.dx[i] * f.dw[i];
    return (f.k[i] * f.e[i] - f.x[i] * f.f[i]) * f.inv_n[i];
  };
  team.each(n, [=](int p) { x.extra[p] += f.pair_extra[p] + correct_part(p) + correct_part(n + p); });
  team.each(g.n_ranks, [=](int r) { x.extra[n + r] = f.pair_extra[n + r]; });
  team.sync();
}

// The longest steps that go `share` of the way to where the first x, k, z or w becomes negative.
template <class Team, class AnyGroup>
LPLB_HD inline ipm::Steps part_steps(Team& team, const AnyGroup& g, const Parts& f, double share) {
  return ipm::within(share, team.maxima(
                                2 * g.n_replicas,
                                [=](int i) {
                                  const double x = f.x[i], k = f.k[i], dx = f.dx[i];
                                  return (dx > 0.0 ? dx * x : -dx * k) / (x * k);
                                },
                                [=](int i) {
                                  const double z = f.z[i], w = f.w[i], a = -f.dz[i] * w, b = -f.dw[i] * z;
                                  return (a > b ? a : b) / (z * w);
                                }));
}

LPLB_HD inline ipm::Steps shorter(ipm::Steps a, ipm::Steps b) {
  return {a.primal < b.primal ? a.primal : b.primal, a.dual < b.dual ? a.dual : b.dual};
}

// Σ x·z + Σ k·w of the parts after the given steps.
template <class Team, class AnyGroup>
LPLB_HD inline double complementarity(Team& team, const AnyGroup& g, const Parts& f, ipm::Steps a) {
  return team.sums(2 * g.n_replicas, [=](int i) {
    const double dx = a.primal * f.dx[i];
    return (f.x[i] + dx) * (f.z[i] + a.dual * f.dz[i]) + (f.k[i] - dx) * (f.w[i] + a.dual * f.dw[i]);
  })[0];
}

template <class Team, class AnyGroup>
LPLB_HD inline void advance(Team& team, const AnyGroup& g, const Parts& f, ipm::Steps a) {
  team.sync();  // everybody has read the old point
  team.each(2 * g.n_replicas, [=](int i) {
    f.x[i] += a.primal * f.dx[i];
    f.k[i] -= a.primal * f.dx[i];
    f.z[i] += a.dual * f.dz[i];
    f.w[i] += a.dual * f.dw[i];
  });
}

// How many pairs there are, and Σ of their products.
template <class Team, class AnyGroup>
LPLB_HD inline Values<2> count_pairs(Team& team, const AnyGroup& g, const Workspace& x, const Parts& f) {
  const auto far = team.sums(
      ipm::n_pairs(g), [x](int i) { return x.y[i] > 0.0 ? 1.0 : 0.0; }, [x](int i) { return x.y[i] * x.z[i]; });
  const auto near = team.sums(
      2 * g.n_replicas, [f](int i) { return f.bound[i] > 0.0 ? 2.0 : 0.0; },
      [f](int i) { return f.x[i] * f.z[i] + f.k[i] * f.w[i]; });
  return {{far[0] + near[0], far[1] + near[1]}};
}

}  // namespace traffic

// Leaves the fractional split, scaled, in y. lambda: the cost of a scaled token that crosses nodes; f.bound is given.
// σ is (μ_aff/μ)² here: with the cube of ipm.h one load in a thousand took twice as many iterations, and none fewer.
template <class Team, class Algebra, class AnyGroup>
LPLB_HD inline TrafficOutcome interior_point_with_traffic(Team& team, Algebra algebra, const AnyGroup& g,
                                                          const Workspace& x, const Parts& f, double lambda,
                                                          IterationRow* log) {
  const Workspace pairs = traffic::far_pairs(x, f);
  const int n = g.n_replicas;
  double t = traffic::start(team, g, x, f, lambda);
  const Values<2> at_start = traffic::count_pairs(team, g, x, f);
  const double inv_n_on = 1.0 / at_start[0];
  double mu = at_start[1] * inv_n_on;
  TrafficOutcome result{{0.0, 0.0, 0, Status::iteration_limit}, 0.0};
  IpmOutcome& out = result.ipm;

  for (;; ++out.iterations) {
    result.max_load = team.few_maxima(g.n_ranks, [&](int r) { return t - x.y[n + r] * g.inv_speed[r]; })[0];
    const auto tokens = team.sums(n, [=](int p) { return x.y[p]; }, [=](int p) { return f.x[n + p]; });
    out.objective = result.max_load + lambda * (tokens[0] + kNodeCost * tokens[1]);
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
    ipm::scale_experts(team, g, x);
    ipm::assemble(team, g, x);
    ipm::carry_extra(team, g, x);
    if (!algebra.template factor_and_solve<2>(team, g.n_padded, x.m, x.inv_d, x.rhs)) {
      out.status = Status::numerical;
      break;
    }
    const double inv_v_x1 = 1.0 / team.few_sums(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[r]; })[0];

    ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<true>(team, g, x);
    traffic::find_steps<false>(team, g, x, f);
    const ipm::Steps affine = traffic::shorter(ipm::affine_steps(team, g, pairs), traffic::part_steps(team, g, f, 1.0));
    const double mu_affine =
        (ipm::complementarity<false>(team, g, pairs, affine) + traffic::complementarity(team, g, f, affine)) * inv_n_on;
    const double ratio = mu_affine / mu;

    traffic::correct(team, g, x, pairs, f, ratio * ratio * mu);
    ipm::carry_extra(team, g, x);
    algebra.solve(team, g.n_padded, x.m, x.inv_d, x.rhs + g.n_padded);
    const double t_new = ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<true>(team, g, x);
    traffic::find_steps<true>(team, g, x, f);
    const ipm::Steps a =
        traffic::shorter(ipm::corrected_steps(team, g, pairs), traffic::part_steps(team, g, f, kStepToBoundary));
    const double mu_new =
        (ipm::complementarity<true>(team, g, pairs, a) + traffic::complementarity(team, g, f, a)) * inv_n_on;
    if (!(mu_new > 0.0 && mu_new < 1e300)) {  // not a number, or nothing left to improve: keep what is there
      out.status = Status::numerical;
      break;
    }
    traffic::advance(team, g, f, a);
    ipm::advance(team, g, pairs, a);
    t += a.primal * (t_new - t);
    mu = mu_new;
    if (log != nullptr && team.rank() == 0) {
      log[out.iterations].step_primal = a.primal;
      log[out.iterations].step_dual = a.dual;
    }
  }
  team.sync();  // everybody has read the last point
  team.each(n, [=](int p) { x.y[p] += f.x[p] + f.x[n + p]; });
  team.sync();
  return result;
}

}  // namespace LPLB_ISA
}  // namespace lplb
