// Mehrotra's predictor–corrector interior-point method, reduced to a system in the ranks alone (design.md §3).
//
//     minimise t   subject to   a_r + Σ_{p on r} y_p + s_r = t·v_r,   Σ_{p of e} y_p = w_e,   y, s ≥ 0
//     duals        u_r ≥ 0 with Σ v_r u_r = 1,   m_e free,   z_p = u_{r(p)} + m_e ≥ 0
//
// The start is feasible, primal and dual, and every step keeps it so, up to rounding; so there are no residuals to
// carry, and m_e itself is never needed: z_p takes its steps. Loads arrive scaled to a mean of 1 per unit of speed.
// Replicas of experts without tokens stay at y_p = 0, z_p = 1 and take no steps; no sum sees them.
//
// A rank's slack and its dual, (s_r, u_r), are one more complementary pair like (y_p, z_p), and are stored behind them:
// the pairs are 0 … n_replicas + n_ranks - 1. Divisions are slow on a GPU: 1/z is kept, and dy follows from dz.
#pragma once

#include "linalg.h"
#include "problem.h"

namespace lplb {
inline namespace LPLB_ISA {

inline constexpr double kStepToBoundary = 0.99;
inline constexpr double kStartAbove = 1.05;  // t at the start, over the even split's maximum

struct IpmOutcome {
  double objective, bound;  // both scaled
  int iterations;
  Status status;
};

namespace ipm {

template <class AnyGroup>
LPLB_HD inline int n_pairs(const AnyGroup& g) {
  return g.n_replicas + g.n_ranks;
}

// t a little above the maximum of the split in y; u = u0. Returns t.
template <class Team, class AnyGroup>
LPLB_HD inline double start_ranks(Team& team, const AnyGroup& g, const Workspace& x, double u0) {
  double *s = x.y + g.n_replicas, *u = x.z + g.n_replicas;
  team.each(g.n_ranks, [&](int r) {
    double load = x.a[r];
    in_order<4, true>(
        g.rank_begin[r], g.rank_begin[r + 1], [&](int i) { return x.y[g.rank_replica[i]]; },
        [&](int, double y) { load += y; });
    s[r] = load;
    u[r] = u0;
    x.dz[g.n_replicas + r] = 0.0;
  });
  team.sync();
  const double t = kStartAbove * team.few_maxima(g.n_ranks, [&](int r) { return s[r] * g.inv_speed[r]; })[0];
  team.sync();
  team.each(g.n_ranks, [&](int r) { s[r] = t * g.speed[r] - s[r]; });
  team.sync();
  return t;
}

// y: the even split; u = 1/Σv; z_p = u_r. Returns t.
template <class Team, class AnyGroup>
LPLB_HD inline double start(Team& team, const AnyGroup& g, const Workspace& x) {
  const double u0 = 1.0 / team.few_sums(g.n_ranks, [&](int r) { return g.speed[r]; })[0];
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
    const bool on = x.w[e] > 0.0;
    const double even = x.w[e] / (end - begin);
    LPLB_LOOP
    for (int p = begin; p < end; ++p) {
      x.y[p] = even;
      x.z[p] = on ? u0 : 1.0;
      x.dz[p] = 0.0;
    }
  });
  team.sync();
  return start_ranks(team, g, x, u0);
}

// Σ u_r a_r + Σ w_e min_{p of e} u_{r(p)}, for u scaled to Σ v_r u_r = 1: a true lower bound whatever u ≥ 0 is.
template <class Team, class AnyGroup>
LPLB_HD inline double lower_bound(Team& team, const AnyGroup& g, const Workspace& x) {
  const double* u = x.z + g.n_replicas;
  const auto ranks =
      team.few_sums(g.n_ranks, [&](int r) { return u[r] * x.a[r]; }, [&](int r) { return g.speed[r] * u[r]; });
  const auto experts = team.sums(g.n_experts, [&](int e) {
    double least = u[g.replica_rank[g.expert_begin[e]]];
    in_order<4, true>(
        g.expert_begin[e] + 1, g.expert_begin[e + 1], [&](int p) { return u[g.replica_rank[p]]; },
        [&](int, double up) { least = up < least ? up : least; });
    return x.w[e] * least;
  });
  return (ranks[0] + experts[0]) / ranks[1];
}

// h_i = y_i/z_i of the first n pairs; and M is emptied.
template <class Team, class AnyGroup>
LPLB_HD inline void scale_pairs(Team& team, const AnyGroup& g, int n, const Workspace& x) {
  team.each(n, [x](int i) {
    x.inv_z[i] = 1.0 / x.z[i];
    x.h[i] = x.y[i] * x.inv_z[i];
  });
  team.each(g.n_padded * g.n_padded, [x](int i) { x.m[i] = 0.0; });
  team.sync();
}

// 1/σ_e, q_e = w_e/σ_e.
template <class Team, class AnyGroup>
LPLB_HD inline void scale_experts(Team& team, const AnyGroup& g, const Workspace& x) {
  team.each(g.n_experts, [&](int e) {
    double sigma = 0.0;
    in_order<4>(
        g.expert_begin[e], g.expert_begin[e + 1], [&](int p) { return x.h[p]; }, [&](int, double h) { sigma += h; });
    x.inv_sigma[e] = sigma > 0.0 ? 1.0 / sigma : 0.0;
    x.q[e] = x.w[e] * x.inv_sigma[e];
  });
  team.sync();
}

// The lower triangle of M and both right-hand sides. M = diag(s/u) + Σ_e (diag(h_e) - h_e h_eᵀ/σ_e) is assembled as
// the Laplacian it is: a diagonal entry adds the off-diagonal ones of its row, so nothing cancels.
template <class Team, class AnyGroup>
LPLB_HD inline void assemble(Team& team, const AnyGroup& g, const Workspace& x) {
  const int n = g.n_padded;
  team.each(n, [&](int r) {
    if (r >= g.n_ranks) {
      x.m[r * n + r] = 1.0;
      x.rhs[r] = x.rhs[n + r] = 0.0;
      return;
    }
    double diagonal = x.h[g.n_replicas + r];
    double b = x.a[r];
    LPLB_LOOP
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int p = g.rank_replica[i], e = g.replica_expert[p];
      const double factor = x.h[p] * x.inv_sigma[e];
      double others = 0.0;
      struct Entry {
        double h, m;
        int at;
      };
      in_order<4>(
          g.expert_begin[e], p,  // slots ascend, and with them ranks: below the diagonal
          [&](int q) {
            const int at = g.replica_rank[q] * n + r;
            return Entry{x.h[q], x.m[at], at};
          },
          [&](int, Entry other) {
            others += other.h;
            x.m[other.at] = other.m - factor * other.h;
          });
      in_order<4>(p + 1, g.expert_begin[e + 1], [&](int q) { return x.h[q]; }, [&](int, double h) { others += h; });
      diagonal += factor * others;
      b += x.h[p] * x.q[e];
    }
    x.m[r * n + r] = diagonal;
    x.rhs[r] = g.speed[r];
    x.rhs[n + r] = x.b[r] = b;
  });
  team.sync();
}

// du from the solved columns (M⁻¹v, M⁻¹b), such that Σ v_r du_r = 0. Returns the new t.
template <class Team, class AnyGroup>
LPLB_HD inline double rank_step(Team& team, const AnyGroup& g, const Workspace& x, double inv_v_x1) {
  const int n = g.n_padded;
  double* du = x.dz + g.n_replicas;
  const double t = team.few_sums(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[n + r]; })[0] * inv_v_x1;
  team.each(g.n_ranks, [&](int r) { du[r] = x.rhs[n + r] - t * x.rhs[r]; });
  team.sync();
  return t;
}

// dz of the replicas that belongs to du. With kCorrect it carries the second-order terms. q is free, and holds dm_e.
template <bool kCorrect, class Team, class AnyGroup>
LPLB_HD inline void complete_step(Team& team, const AnyGroup& g, const Workspace& x) {
  const double* du = x.dz + g.n_replicas;
  team.each(g.n_experts, [&](int e) {
    double target = -x.w[e];
    struct Term {
      double product, extra;
    };
    in_order<4, true>(
        g.expert_begin[e], g.expert_begin[e + 1],
        [&](int p) { return Term{x.h[p] * du[g.replica_rank[p]], kCorrect ? x.extra[p] : 0.0}; },
        [&](int, Term term) {
          target -= term.product;
          if (kCorrect) target += term.extra;
        });
    x.q[e] = target * x.inv_sigma[e];
  });
  team.sync();
  team.each(g.n_replicas, [&](int p) {
    const int e = g.replica_expert[p];
    const double step = du[g.replica_rank[p]] + x.q[e];
    x.dz[p] = x.w[e] > 0.0 ? step : 0.0;
  });
  team.sync();
}

// dy of pair i.
template <bool kCorrect>
LPLB_HD inline double dy(const Workspace& x, int i) {
  const double step = -x.y[i] - x.h[i] * x.dz[i];
  return kCorrect ? step + x.extra[i] : step;
}

// Second-order terms of the complementarity products, centred on sigma_mu, in the place of inv_z.
template <class Team>
LPLB_HD inline void correct_pairs(Team& team, int n, const Workspace& x, double sigma_mu) {
  team.each(n, [x, sigma_mu](int i) {
    const double extra = (sigma_mu - dy<false>(x, i) * x.dz[i]) * x.inv_z[i];
    x.extra[i] = x.h[i] > 0.0 ? extra : 0.0;
  });
  team.sync();
}

// The right-hand side that carries what `extra` adds to y and s.
template <class Team, class AnyGroup>
LPLB_HD inline void carry_extra(Team& team, const AnyGroup& g, const Workspace& x) {
  team.each(g.n_experts, [&](int e) {
    double sum = 0.0;
    in_order<4>(
        g.expert_begin[e], g.expert_begin[e + 1], [&](int p) { return x.extra[p]; },
        [&](int, double extra) { sum += extra; });
    x.q[e] = sum * x.inv_sigma[e];
  });
  team.sync();
  team.each(g.n_padded, [&](int r) {
    if (r >= g.n_ranks) {
      x.rhs[g.n_padded + r] = 0.0;
      return;
    }
    double b = x.b[r] + x.extra[g.n_replicas + r];
    in_order<4, true>(
        g.rank_begin[r], g.rank_begin[r + 1],
        [&](int i) {
          const int p = g.rank_replica[i];
          return x.extra[p] - x.h[p] * x.q[g.replica_expert[p]];
        },
        [&](int, double term) { b += term; });
    x.rhs[g.n_padded + r] = b;
  });
  team.sync();
}

struct Steps {
  double primal, dual;
};

// Steps of at most 1 that go `share` of the way to where the first pair becomes negative.
LPLB_HD inline Steps within(double share, Values<2> fastest) {
  return {fastest[0] > share ? share / fastest[0] : 1.0, fastest[1] > share ? share / fastest[1] : 1.0};
}

// The longest steps that keep y, s and z, u non-negative. Without extra, -dy/y is 1 + dz/z. What stays at y = 0 gives
// 1, which shortens no affine step, and NaN, which is passed over.
template <class Team>
LPLB_HD inline Steps affine_steps(Team& team, int n, const Workspace& x) {
  return within(
      1.0,
      team.maxima(n, [x](int i) { return 1.0 + x.dz[i] * x.inv_z[i]; }, [x](int i) { return -x.dz[i] * x.inv_z[i]; }));
}

template <class Team>
LPLB_HD inline Steps corrected_steps(Team& team, int n, const Workspace& x) {
  return within(kStepToBoundary, team.maxima(
                                     n, [x](int i) { return -dy<true>(x, i) * (1.0 / x.y[i]); },
                                     [x](int i) { return -x.dz[i] * (1.0 / x.z[i]); }));
}

// Σ y_p z_p + Σ s_r u_r after the given steps.
template <bool kCorrect, class Team>
LPLB_HD inline double complementarity(Team& team, int n, const Workspace& x, Steps a) {
  return team.sums(n,
                   [x, a](int i) { return (x.y[i] + a.primal * dy<kCorrect>(x, i)) * (x.z[i] + a.dual * x.dz[i]); })[0];
}

template <class Team>
LPLB_HD inline void advance(Team& team, int n, const Workspace& x, Steps a) {
  team.sync();  // everybody has read the old point
  team.each(n, [x, a](int i) {
    x.y[i] += a.primal * dy<true>(x, i);
    x.z[i] += a.dual * x.dz[i];
  });
  team.sync();
}

}  // namespace ipm

// Leaves the fractional split, scaled, in y. `log`, if not null, gets one row per iteration.
template <class Team, class Algebra, class AnyGroup>
LPLB_HD inline IpmOutcome interior_point(Team& team, Algebra algebra, const AnyGroup& g, const Workspace& x,
                                         IterationRow* log) {
  const int n_pairs = ipm::n_pairs(g);
  double t = ipm::start(team, g, x);
  const auto at_start =
      team.sums(n_pairs, [x](int i) { return x.y[i] > 0.0 ? 1.0 : 0.0; }, [x](int i) { return x.y[i] * x.z[i]; });
  const double inv_n_on = 1.0 / at_start[0];
  double mu = at_start[1] * inv_n_on;
  IpmOutcome out{0.0, 0.0, 0, Status::iteration_limit};

  for (;; ++out.iterations) {
    out.objective = team.few_maxima(g.n_ranks, [&](int r) { return t - x.y[g.n_replicas + r] * g.inv_speed[r]; })[0];
    const double bound = ipm::lower_bound(team, g, x);
    out.bound = bound > out.bound ? bound : out.bound;
    const double distance = out.objective - out.bound;
    if (log != nullptr && team.rank() == 0)
      log[out.iterations] = {out.objective, out.bound, distance / out.bound, mu, 0.0, 0.0};
    if (distance <= kGapTolerance * out.bound) {
      out.status = Status::solved;
      break;
    }
    if (out.iterations == kMaxIterations) break;

    ipm::scale_pairs(team, g, n_pairs, x);
    ipm::scale_experts(team, g, x);
    ipm::assemble(team, g, x);
    if (!algebra.template factor_and_solve<2>(team, g.n_padded, x.m, x.inv_d, x.rhs)) {
      out.status = Status::numerical;
      break;
    }
    const double inv_v_x1 = 1.0 / team.few_sums(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[r]; })[0];

    ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<false>(team, g, x);
    const double mu_affine =
        ipm::complementarity<false>(team, n_pairs, x, ipm::affine_steps(team, n_pairs, x)) * inv_n_on;
    const double ratio = mu_affine / mu;

    ipm::correct_pairs(team, n_pairs, x, ratio * ratio * ratio * mu);
    ipm::carry_extra(team, g, x);
    algebra.solve(team, g.n_padded, x.m, x.inv_d, x.rhs + g.n_padded);
    const double t_new = ipm::rank_step(team, g, x, inv_v_x1);
    ipm::complete_step<true>(team, g, x);
    const ipm::Steps a = ipm::corrected_steps(team, n_pairs, x);
    const double mu_new = ipm::complementarity<true>(team, n_pairs, x, a) * inv_n_on;
    if (!(mu_new > 0.0 && mu_new < 1e300)) {  // not a number, or nothing left to improve: keep what is there
      out.status = Status::numerical;
      break;
    }
    ipm::advance(team, n_pairs, x, a);
    t += a.primal * (t_new - t);
    mu = mu_new;
    if (log != nullptr && team.rank() == 0) {
      log[out.iterations].step_primal = a.primal;
      log[out.iterations].step_dual = a.dual;
    }
  }
  return out;
}

}  // namespace LPLB_ISA
}  // namespace lplb
