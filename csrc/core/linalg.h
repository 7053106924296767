// The one dense factorisation: M = L·D·Lᵀ, Cholesky without square roots, for symmetric positive definite M.
//
// Storage, column-major n×n: on entry the lower triangle of M; on exit L below the diagonal and U = D·Lᵀ above it, so
// both triangular solves walk down columns. inv_d[k] = 1 / D[k]. n is a multiple of 8; padding is the identity.
//
// Every entry receives its updates in index order, in the solo version and in the team's, so both give the same bits.
#pragma once

#include <cstring>

#include "team.h"

namespace lplb {
inline namespace LPLB_ISA {

#ifndef __CUDACC__
#define LPLB_INLINE inline __attribute__((always_inline))

namespace solo {

static LPLB_INLINE void load(Vec& v, const double* p) { std::memcpy(&v, p, sizeof v); }
static LPLB_INLINE void store(double* p, const Vec& v) { std::memcpy(p, &v, sizeof v); }

// Rows [i, i + 4·kRows) of the panel's four columns: subtract what the columns before j0 contribute.
template <int kRows>
static LPLB_INLINE void update_panel(int n, int j0, int i, double* m) {
  Vec acc[4][kRows];
  for (int c = 0; c < 4; ++c)
    for (int v = 0; v < kRows; ++v) load(acc[c][v], m + (j0 + c) * n + i + kVec * v);
  const double* u0 = m + j0 * n;
  for (int k = 0; k < j0; ++k) {
    Vec l[kRows];
    for (int v = 0; v < kRows; ++v) load(l[v], m + k * n + i + kVec * v);
    for (int c = 0; c < 4; ++c) {
      const double u = u0[c * n + k];
      for (int v = 0; v < kRows; ++v) acc[c][v] -= l[v] * u;
    }
  }
  for (int c = 0; c < 4; ++c)
    for (int v = 0; v < kRows; ++v) store(m + (j0 + c) * n + i + kVec * v, acc[c][v]);
}

// Columns j0 … j0+3, already updated by all columns before them.
static LPLB_INLINE bool factor_panel(int n, int j0, double* m, double* inv_d) {
  // the 4×4 block on the diagonal, then the rows below it, four at a time
  double u[4][4], inv[4];  // u[j][c] = U(j0 + j, j0 + c)
  for (int j = 0; j < 4; ++j) {
    double* col = m + (j0 + j) * n + j0;
    const double d = col[j];
    if (!(d > 0.0)) return false;
    inv[j] = inv_d[j0 + j] = 1.0 / d;
    for (int c = j + 1; c < 4; ++c) {
      u[j][c] = m[(j0 + c) * n + j0 + j] = col[c];
      col[c] *= inv[j];
    }
    for (int c = j + 1; c < 4; ++c)
      for (int i = c; i < 4; ++i) m[(j0 + c) * n + j0 + i] -= col[i] * u[j][c];
  }
  for (int i = j0 + 4; i < n; i += kVec) {
    Vec x[4];
    for (int c = 0; c < 4; ++c) load(x[c], m + (j0 + c) * n + i);
    for (int j = 0; j < 4; ++j) {
      const Vec raw = x[j];
      for (int k = 0; k < kVec; ++k) m[(i + k) * n + j0 + j] = raw[k];
      x[j] = raw * inv[j];
      for (int c = j + 1; c < 4; ++c) x[c] -= x[j] * u[j][c];
    }
    for (int c = 0; c < 4; ++c) store(m + (j0 + c) * n + i, x[c]);
  }
  return true;
}

static LPLB_INLINE bool factor(int n, double* m, double* inv_d) {
  for (int j0 = 0; j0 < n; j0 += 4) {
    int i = j0;
    for (; i + 2 * kVec <= n; i += 2 * kVec) update_panel<2>(n, j0, i, m);
    for (; i < n; i += kVec) update_panel<1>(n, j0, i, m);
    if (!factor_panel(n, j0, m, inv_d)) return false;
  }
  return true;
}

template <int kRhs>
static LPLB_INLINE void solve(int n, const double* m, const double* inv_d, double* b) {
  for (int k0 = 0; k0 < n; k0 += 4) {
    double x[kRhs][4];
    for (int r = 0; r < kRhs; ++r) {
      for (int k = 0; k < 4; ++k) x[r][k] = b[r * n + k0 + k];
      for (int k = 0; k < 3; ++k)
        for (int i = k + 1; i < 4; ++i) x[r][i] -= m[(k0 + k) * n + k0 + i] * x[r][k];
      for (int k = 1; k < 4; ++k) b[r * n + k0 + k] = x[r][k];
    }
    for (int i = k0 + 4; i < n; i += kVec)
      for (int r = 0; r < kRhs; ++r) {
        Vec y, l;
        load(y, b + r * n + i);
        for (int k = 0; k < 4; ++k) {
          load(l, m + (k0 + k) * n + i);
          y -= l * x[r][k];
        }
        store(b + r * n + i, y);
      }
  }
  for (int k0 = n - 4; k0 >= 0; k0 -= 4) {
    double x[kRhs][4];
    for (int r = 0; r < kRhs; ++r) {
      for (int k = 0; k < 4; ++k) x[r][k] = b[r * n + k0 + k];
      for (int k = 3; k >= 0; --k) {
        x[r][k] *= inv_d[k0 + k];
        for (int i = 0; i < k; ++i) x[r][i] -= m[(k0 + k) * n + k0 + i] * x[r][k];
      }
      for (int k = 0; k < 4; ++k) b[r * n + k0 + k] = x[r][k];
    }
    for (int i = 0; i < k0; i += kVec)
      for (int r = 0; r < kRhs; ++r) {
        Vec y, u;
        load(y, b + r * n + i);
        for (int k = 3; k >= 0; --k) {
          load(u, m + (k0 + k) * n + i);
          y -= u * x[r][k];
        }
        store(b + r * n + i, y);
      }
  }
}

}  // namespace solo
#endif  // __CUDACC__

// In place; false when a pivot is not positive (M is then overwritten in part). All members get the same answer.
template <class Team>
LPLB_HD inline bool factor(Team& team, int n, double* m, double* inv_d) {
#ifndef __CUDACC__
  if constexpr (Team::kSolo) {
    if (n == 8) return solo::factor(8, m, inv_d);  // a size the compiler can unroll
    return solo::factor(n, m, inv_d);
  }
#endif
  for (int k = 0; k < n; ++k) {
    const double* col = m + k * n;
    const double d = col[k];
    if (!(d > 0.0)) return false;  // col[k] was final before the last sync: every member reads the same value
    const double inv = 1.0 / d;
    // Member i owns row i: it scales L[i,k], mirrors the unscaled value to U[k,i] and updates its row.
    for (int i = team.rank(); i < n; i += team.size()) {
      if (i == k) inv_d[k] = inv;
      if (i > k) m[i * n + k] = col[i];
    }
    team.sync();
    for (int i = team.rank(); i < n; i += team.size()) {
      if (i <= k) continue;
      const double l = m[i * n + k] * inv;
      for (int j = k + 1; j <= i; ++j) m[j * n + i] -= l * m[j * n + k];
      m[k * n + i] = l;
    }
    team.sync();
  }
  return true;
}

// Solves M·x = b in place for kRhs right-hand sides b[r·n … r·n + n).
template <int kRhs, class Team>
LPLB_HD inline void solve(Team& team, int n, const double* m, const double* inv_d, double* b) {
#ifndef __CUDACC__
  if constexpr (Team::kSolo) {
    if (n == 8) return solo::solve<kRhs>(8, m, inv_d, b);
    return solo::solve<kRhs>(n, m, inv_d, b);
  }
#endif
  for (int k = 0; k < n - 1; ++k) {
    const double* col = m + k * n;
    for (int r = 0; r < kRhs; ++r) {
      const double bk = b[r * n + k];
      team.each(n - k - 1, [=](int i) { b[r * n + k + 1 + i] -= col[k + 1 + i] * bk; });
    }
    team.sync();
  }
  for (int k = n - 1; k >= 0; --k) {
    const double* col = m + k * n;
    for (int r = 0; r < kRhs; ++r) {
      const double xk = b[r * n + k] * inv_d[k];
      team.each(k, [=](int i) { b[r * n + i] -= col[i] * xk; });
    }
    team.sync();
  }
  team.each(n, [=](int k) {
    for (int r = 0; r < kRhs; ++r) b[r * n + k] *= inv_d[k];
  });
  team.sync();
}

}  // namespace LPLB_ISA
}  // namespace lplb
