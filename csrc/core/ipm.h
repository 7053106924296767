// Mehrotra's predictor–corrector interior-point method, reduced to a system in the ranks alone (design.md §3).
//
//     minimise t   subject to   a_r + Σ_{p on r} y_p + s_r = t·v_r,   Σ_{p of e} y_p = w_e,   y, s ≥ 0
//     duals        u_r ≥ 0 with Σ v_r u_r = 1,   m_e free,   z_p = u_{r(p)} + m_e ≥ 0
//
// The start is feasible, primal and dual, and every step keeps it so, up to rounding; so there are no residuals to
// carry, and m_e itself is never needed: z_p takes its steps. Loads arrive scaled to a mean of 1 per unit of speed.
// Experts without tokens are masked out: on_p = 0, y_p = z_p = 1, and no sum sees them.
//
// A rank's slack and its dual, (s_r, u_r), are one more complementary pair like (y_p, z_p), and are stored behind them:
// the pairs are 0 … n_replicas + n_ranks - 1.
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

LPLB_HD inline int n_pairs(const Group& g) { return g.n_replicas + g.n_ranks; }

// y: the even split; t a little above its maximum; u = 1/Σv; z_p = u_r. Returns t.
template <class Team>
LPLB_HD inline double start(Team& team, const Group& g, const Workspace& x) {
  double *s = x.y + g.n_replicas, *u = x.z + g.n_replicas;
  const double u0 = 1.0 / team.sum(g.n_ranks, [&](int r) { return g.speed[r]; });
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
    const bool on = x.w[e] > 0.0;
    const double even = x.w[e] / (end - begin);
    for (int p = begin; p < end; ++p) {
      x.on[p] = on ? 1.0 : 0.0;
      x.y[p] = on ? even : 1.0;
      x.z[p] = on ? u0 : 1.0;
    }
  });
  team.sync();
  team.each(g.n_ranks, [&](int r) {
    double load = x.a[r];
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int p = g.rank_replica[i];
      load += x.on[p] * x.y[p];
    }
    s[r] = load;
    u[r] = u0;
    x.on[g.n_replicas + r] = 1.0;
  });
  team.sync();
  const double t = kStartAbove * team.max(g.n_ranks, [&](int r) { return s[r] / g.speed[r]; });
  team.sync();
  team.each(g.n_ranks, [&](int r) { s[r] = t * g.speed[r] - s[r]; });
  team.each(n_pairs(g), [x](int i) { x.dy[i] = x.dz[i] = 0.0; });
  team.sync();
  return t;
}

// Σ u_r a_r + Σ w_e min_{p of e} u_{r(p)}, for u scaled to Σ v_r u_r = 1: a true lower bound whatever u ≥ 0 is.
template <class Team>
LPLB_HD inline double lower_bound(Team& team, const Group& g, const Workspace& x) {
  const double* u = x.z + g.n_replicas;
  team.each(g.n_experts, [&](int e) {
    double least = u[g.replica_rank[g.expert_begin[e]]];
    for (int p = g.expert_begin[e] + 1; p < g.expert_begin[e + 1]; ++p) {
      const double up = u[g.replica_rank[p]];
      least = up < least ? up : least;
    }
    x.q[e] = least;
  });
  team.sync();
  const double bound = team.sum(g.n_ranks, [&](int r) { return u[r] * x.a[r]; }) +
                       team.sum(g.n_experts, [&](int e) { return x.w[e] * x.q[e]; });
  const double sum_u = team.sum(g.n_ranks, [&](int r) { return g.speed[r] * u[r]; });
  team.sync();
  return bound / sum_u;
}

// h_p = y_p/z_p, 1/σ_e, q_e = w_e/σ_e.
template <class Team>
LPLB_HD inline void scale(Team& team, const Group& g, const Workspace& x) {
  team.each(n_pairs(g), [x](int i) { x.h[i] = x.on[i] * x.y[i] / x.z[i]; });
  team.sync();
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
    double sigma = 0.0;
    for (int p = begin; p < end; ++p) sigma += x.h[p];
    x.inv_sigma[e] = sigma > 0.0 ? 1.0 / sigma : 0.0;
    x.q[e] = x.w[e] * x.inv_sigma[e];
  });
  team.sync();
}

// The lower triangle of M and both right-hand sides. M = diag(s/u) + Σ_e (diag(h_e) - h_e h_eᵀ/σ_e) is assembled as
// the Laplacian it is: a diagonal entry adds the off-diagonal ones of its row, so nothing cancels.
template <class Team>
LPLB_HD inline void assemble(Team& team, const Group& g, const Workspace& x) {
  const int n = g.n_padded;
  team.each(n * n, [x](int i) { x.m[i] = 0.0; });
  team.sync();
  team.each(n, [&](int r) {
    if (r >= g.n_ranks) {
      x.m[r * n + r] = 1.0;
      x.rhs[r] = x.rhs[n + r] = 0.0;
      return;
    }
    double diagonal = x.h[g.n_replicas + r];
    double b = x.a[r];
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int p = g.rank_replica[i], e = g.replica_expert[p];
      const double factor = x.h[p] * x.inv_sigma[e];
      double others = 0.0;
      for (int q = g.expert_begin[e]; q < p; ++q) {  // slots ascend, and with them ranks: below the diagonal
        others += x.h[q];
        x.m[g.replica_rank[q] * n + r] -= factor * x.h[q];
      }
      for (int q = p + 1; q < g.expert_begin[e + 1]; ++q) others += x.h[q];
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
template <class Team>
LPLB_HD inline double rank_step(Team& team, const Group& g, const Workspace& x, double v_dot_x1) {
  const int n = g.n_padded;
  double* du = x.dz + g.n_replicas;
  const double t = team.sum(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[n + r]; }) / v_dot_x1;
  team.each(g.n_ranks, [&](int r) { du[r] = x.rhs[n + r] - t * x.rhs[r]; });
  team.sync();
  return t;
}

// dz, dy and ds that belong to du. With kCorrect they carry the second-order terms.
template <bool kCorrect, class Team>
LPLB_HD inline void complete_step(Team& team, const Group& g, const Workspace& x) {
  const double* du = x.dz + g.n_replicas;
  team.each(g.n_experts, [&](int e) {
    const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
    double target = -x.w[e];
    for (int p = begin; p < end; ++p) {
      target -= x.h[p] * du[g.replica_rank[p]];
      if (kCorrect) target += x.extra[p];
    }
    const double dm = target * x.inv_sigma[e];
    for (int p = begin; p < end; ++p) x.dz[p] = x.on[p] * (du[g.replica_rank[p]] + dm);
  });
  team.sync();
  team.each(n_pairs(g), [x](int i) {
    const double dy = -(x.on[i] * x.y[i]) - x.h[i] * x.dz[i];
    x.dy[i] = kCorrect ? dy + x.extra[i] : dy;
  });
  team.sync();
}

// Second-order terms of the complementarity products, centred on sigma_mu, and the right-hand side that carries them.
template <class Team>
LPLB_HD inline void correct(Team& team, const Group& g, const Workspace& x, double sigma_mu) {
  team.each(n_pairs(g), [x, sigma_mu](int i) { x.extra[i] = x.on[i] * (sigma_mu - x.dy[i] * x.dz[i]) / x.z[i]; });
  team.sync();
  team.each(g.n_experts, [&](int e) {
    double sum = 0.0;
    for (int p = g.expert_begin[e]; p < g.expert_begin[e + 1]; ++p) sum += x.extra[p];
    x.q[e] = sum * x.inv_sigma[e];
  });
  team.sync();
  team.each(g.n_padded, [&](int r) {
    if (r >= g.n_ranks) {
      x.rhs[g.n_padded + r] = 0.0;
      return;
    }
    double b = x.b[r] + x.extra[g.n_replicas + r];
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int p = g.rank_replica[i];
      b += x.extra[p] - x.h[p] * x.q[g.replica_expert[p]];
    }
    x.rhs[g.n_padded + r] = b;
  });
  team.sync();
}

struct Steps {
  double primal, dual;
};

// The longest steps, at most 1, that keep y, s and z, u non-negative after `share` of the way to the boundary.
template <class Team>
LPLB_HD inline Steps step_lengths(Team& team, const Group& g, const Workspace& x, double share) {
  const double primal = team.max(n_pairs(g), [x](int i) { return -x.dy[i] / x.y[i]; });
  const double dual = team.max(n_pairs(g), [x](int i) { return -x.dz[i] / x.z[i]; });
  return {primal > share ? share / primal : 1.0, dual > share ? share / dual : 1.0};
}

// Σ y_p z_p + Σ s_r u_r after the given steps.
template <class Team>
LPLB_HD inline double complementarity(Team& team, const Group& g, const Workspace& x, Steps a) {
  return team.sum(n_pairs(g),
                  [x, a](int i) { return x.on[i] * ((x.y[i] + a.primal * x.dy[i]) * (x.z[i] + a.dual * x.dz[i])); });
}

template <class Team>
LPLB_HD inline void advance(Team& team, const Group& g, const Workspace& x, Steps a) {
  team.sync();  // everybody has read the old point
  team.each(n_pairs(g), [x, a](int i) {
    x.y[i] += a.primal * x.dy[i];
    x.z[i] += a.dual * x.dz[i];
  });
  team.sync();
}

}  // namespace ipm

// Leaves the fractional split, scaled, in y (masked by on). `log`, if not null, gets one row per iteration.
template <class Team>
LPLB_HD inline IpmOutcome interior_point(Team& team, const Group& g, const Workspace& x, IterationRow* log) {
  double t = ipm::start(team, g, x);
  const double n_on = team.sum(ipm::n_pairs(g), [&](int i) { return x.on[i]; });
  double mu = ipm::complementarity(team, g, x, {0.0, 0.0}) / n_on;
  IpmOutcome out{0.0, 0.0, 0, Status::iteration_limit};

  for (;; ++out.iterations) {
    out.objective = team.max(g.n_ranks, [&](int r) { return t - x.y[g.n_replicas + r] / g.speed[r]; });
    const double bound = ipm::lower_bound(team, g, x);
    out.bound = bound > out.bound ? bound : out.bound;
    const double gap = (out.objective - out.bound) / out.bound;
    if (log != nullptr && team.rank() == 0) log[out.iterations] = {out.objective, out.bound, gap, mu, 0.0, 0.0};
    if (gap <= kGapTolerance) {
      out.status = Status::solved;
      break;
    }
    if (out.iterations == kMaxIterations) break;

    ipm::scale(team, g, x);
    ipm::assemble(team, g, x);
    if (!factor(team, g.n_padded, x.m, x.inv_d)) {
      out.status = Status::numerical;
      break;
    }
    solve<2>(team, g.n_padded, x.m, x.inv_d, x.rhs);
    const double v_dot_x1 = team.sum(g.n_ranks, [&](int r) { return g.speed[r] * x.rhs[r]; });

    ipm::rank_step(team, g, x, v_dot_x1);
    ipm::complete_step<false>(team, g, x);
    const double mu_affine = ipm::complementarity(team, g, x, ipm::step_lengths(team, g, x, 1.0)) / n_on;
    const double ratio = mu_affine / mu;

    ipm::correct(team, g, x, ratio * ratio * ratio * mu);
    solve<1>(team, g.n_padded, x.m, x.inv_d, x.rhs + g.n_padded);
    const double t_new = ipm::rank_step(team, g, x, v_dot_x1);
    ipm::complete_step<true>(team, g, x);
    const ipm::Steps a = ipm::step_lengths(team, g, x, kStepToBoundary);
    const double mu_new = ipm::complementarity(team, g, x, a) / n_on;
    if (!(mu_new > 0.0 && mu_new < 1e300)) {  // not a number, or nothing left to improve: keep what is there
      out.status = Status::numerical;
      break;
    }
    ipm::advance(team, g, x, a);
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
