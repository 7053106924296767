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

// b ← L⁻¹·b
template <int kRhs>
static LPLB_INLINE void forward(int n, const double* m, double* b) {
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
}

// b ← U⁻¹·b
template <int kRhs>
static LPLB_INLINE void backward(int n, const double* m, const double* inv_d, double* b) {
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

// A team factors panels of kColumns columns; with eight the registers would spill. Every member eliminates the block on
// the diagonal for itself, in registers, so nobody waits for another inside a panel. In every warp the first kColumns
// lanes hold the rows of that block, and the other lanes rows below it.
namespace panel {

inline constexpr int kColumns = 4;
inline constexpr int kBelow = kWarpSize - kColumns;

// One row of a panel in the registers of a lane: x its columns, y the right-hand sides.
template <int kRhs>
struct Row {
  double x[kColumns], raw[kColumns], y[kRhs];
  int i;

  LPLB_HD void load(int n, int j0, int row, const double* m, const double* b) {
    i = row;
    LPLB_UNROLL
    for (int c = 0; c < kColumns; ++c) x[c] = row < n ? m[(j0 + c) * n + row] : 0.0;
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r) y[r] = row < n ? b[r * n + row] : 0.0;
  }

  // L into the lower triangle, U into the upper; `columns` of them lie left of the diagonal.
  LPLB_HD void store(int n, int j0, int columns, double* m, double* b) const {
    LPLB_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (c <= columns) m[(j0 + c) * n + i] = x[c];
      if (c < columns) m[i * n + j0 + c] = raw[c];
    }
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r) b[r * n + i] = y[r];
  }
};

// Eliminates the panel's columns from a row, of which `columns` lie left of the diagonal. inv_own: 1/D of the column
// number `columns`. False, for every row alike, when a pivot is not positive.
template <int kRhs>
LPLB_HD inline bool eliminate(int n, int j0, const double* m, const double* b, int columns, Row<kRhs>& row,
                              double& inv_own) {
  double block[kColumns][kColumns], z[kColumns][kRhs];  // block[c][k], k ≤ c: row c of the block on the diagonal
  LPLB_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    LPLB_UNROLL
    for (int k = 0; k <= c; ++k) block[c][k] = m[(j0 + k) * n + j0 + c];
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r) z[c][r] = b[r * n + j0 + c];
  }
  bool positive = true;
  LPLB_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    positive = positive && block[k][k] > 0.0;
    const double inv = 1.0 / block[k][k];
    double u[kColumns];
    LPLB_UNROLL
    for (int c = k + 1; c < kColumns; ++c) u[c] = block[c][k];
    LPLB_UNROLL
    for (int c = k + 1; c < kColumns; ++c) {
      const double l = u[c] * inv;
      LPLB_UNROLL
      for (int j = k + 1; j <= c; ++j) block[c][j] -= l * u[j];
      LPLB_UNROLL
      for (int r = 0; r < kRhs; ++r) z[c][r] -= l * z[k][r];
    }
    if (columns == k) inv_own = inv;
    if (columns > k) {
      row.raw[k] = row.x[k];
      row.x[k] *= inv;
      LPLB_UNROLL
      for (int c = k + 1; c < kColumns; ++c) row.x[c] -= row.x[k] * u[c];
      LPLB_UNROLL
      for (int r = 0; r < kRhs; ++r) row.y[r] -= row.x[k] * z[k][r];
    }
  }
  return positive;
}

// Rows [i0, i0 + 32) of the columns [c0, c0 + kColumns): subtracts what the panel at j0 contributes.
template <class Warp>
LPLB_HD inline void update_block(Warp& warp, int n, int j0, int c0, int i0, double* m) {
  const int i = i0 + warp.rank();
  if (i >= n) return;
  double l[kColumns];
  LPLB_UNROLL
  for (int k = 0; k < kColumns; ++k) l[k] = m[(j0 + k) * n + i];
  double x[kColumns];  // all columns are loaded before one is stored, so that the loads overlap
  LPLB_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const double* u = m + (c0 + c) * n + j0;
    x[c] = m[(c0 + c) * n + i];
    LPLB_UNROLL
    for (int k = 0; k < kColumns; ++k) x[c] -= l[k] * u[k];
  }
  LPLB_UNROLL
  for (int c = 0; c < kColumns; ++c) m[(c0 + c) * n + i] = x[c];
}

template <class Team>
LPLB_HD inline void update_trailing(Team& team, int n, int j0, double* m) {
  auto& warp = team.warp();
  LPLB_LOOP
  for (int c0 = j0 + kColumns * (1 + team.warp_index()); c0 < n; c0 += kColumns * team.n_warps()) LPLB_LOOP
  for (int i0 = c0; i0 < n; i0 += kWarpSize) update_block(warp, n, j0, c0, i0, m);
}

template <int kRhs, class Team>
LPLB_HD inline bool factor_and_forward(Team& team, int n, double* m, double* inv_d, double* b) {
  const int lane = team.warp().rank();
  LPLB_LOOP
  for (int j0 = 0; j0 < n; j0 += kColumns) {
    Row<kRhs> row;
    double inv = 0.0;
    const int columns = lane < kColumns ? lane : kColumns;
    int start = j0 + kColumns + kBelow * team.warp_index();
    do {
      row.load(n, j0, lane < kColumns ? j0 + lane : start + lane - kColumns, m, b);
      if (!eliminate(n, j0, m, b, columns, row, inv)) return false;
      if (lane >= kColumns && row.i < n) row.store(n, j0, columns, m, b);
      start += kBelow * team.n_warps();
    } while (start < n);
    team.sync();  // every warp has read the block on the diagonal
    if (team.warp_index() == 0 && lane < kColumns) {
      row.store(n, j0, columns, m, b);
      inv_d[j0 + lane] = inv;
    }
    update_trailing(team, n, j0, m);
    team.sync();
  }
  return true;
}

}  // namespace panel

// The triangular solves of a warp: lane l holds the rows l, l + 32, …, kPerLane of them, of the right-hand sides.
namespace rows {

template <int kPerLane, int kRhs>
struct Rows {
  double v[kPerLane][kRhs];
};

// Columns whose entries are loaded before the first is used.
template <int kPerLane>
inline constexpr int kAtOnce = kPerLane > 2 ? 4 : 8;

template <int kPerLane, int kRhs>
LPLB_HD inline Rows<kPerLane, kRhs> load(int lane, int n, const double* b) {
  Rows<kPerLane, kRhs> x;
  LPLB_UNROLL
  for (int t = 0; t < kPerLane; ++t) {
    const int i = lane + kWarpSize * t;
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r) x.v[t][r] = i < n ? b[r * n + i] : 0.0;
  }
  return x;
}

template <int kPerLane, int kRhs>
LPLB_HD inline void store(int lane, int n, const Rows<kPerLane, kRhs>& x, double* b) {
  LPLB_UNROLL
  for (int t = 0; t < kPerLane; ++t) {
    const int i = lane + kWarpSize * t;
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r)
      if (i < n) b[r * n + i] = x.v[t][r];
  }
}

// b ← L⁻¹·b
template <int kPerLane, int kRhs, class Warp>
LPLB_HD inline void forward(Warp& warp, int n, const double* m, double* b) {
  const int lane = warp.rank();
  Rows<kPerLane, kRhs> x = load<kPerLane, kRhs>(lane, n, b);
  LPLB_UNROLL
  for (int t = 0; t < kPerLane; ++t) {
    const int end = n - kWarpSize * t < kWarpSize ? n - kWarpSize * t : kWarpSize;
    LPLB_LOOP
    for (int first = 0; first < end; first += kAtOnce<kPerLane>) {
      double entry[kAtOnce<kPerLane>][kPerLane];
      LPLB_UNROLL
      for (int c = 0; c < kAtOnce<kPerLane>; ++c) LPLB_UNROLL
      for (int s = t; s < kPerLane; ++s) {
        const int i = lane + kWarpSize * s, k = kWarpSize * t + first + c;
        entry[c][s] = m[k * n + (i < n ? i : k)];
      }
      LPLB_UNROLL
      for (int c = 0; c < kAtOnce<kPerLane>; ++c) {
        const int l = first + c, k = kWarpSize * t + l;
        double z[kRhs];
        LPLB_UNROLL
        for (int r = 0; r < kRhs; ++r) z[r] = warp.get(x.v[t][r], l);
        LPLB_UNROLL
        for (int s = t; s < kPerLane; ++s) {
          const int i = lane + kWarpSize * s;
          if (i > k && i < n) {
            LPLB_UNROLL
            for (int r = 0; r < kRhs; ++r) x.v[s][r] -= entry[c][s] * z[r];
          }
        }
      }
    }
  }
  store(lane, n, x, b);
}

// b ← U⁻¹·b
template <int kPerLane, int kRhs, class Warp>
LPLB_HD inline void backward(Warp& warp, int n, const double* m, const double* inv_d, double* b) {
  const int lane = warp.rank();
  Rows<kPerLane, kRhs> x = load<kPerLane, kRhs>(lane, n, b);
  LPLB_UNROLL
  for (int t = kPerLane - 1; t >= 0; --t) {
    const int end = n - kWarpSize * t < kWarpSize ? n - kWarpSize * t : kWarpSize;
    LPLB_LOOP
    for (int last = end - 1; last >= 0; last -= kAtOnce<kPerLane>) {
      double entry[kAtOnce<kPerLane>][kPerLane], inv_of[kAtOnce<kPerLane>];
      LPLB_UNROLL
      for (int c = 0; c < kAtOnce<kPerLane>; ++c) {
        const int k = kWarpSize * t + last - c;
        inv_of[c] = inv_d[k];
        LPLB_UNROLL
        for (int s = 0; s <= t; ++s) {
          const int i = lane + kWarpSize * s;
          entry[c][s] = m[k * n + (i < n ? i : k)];
        }
      }
      LPLB_UNROLL
      for (int c = 0; c < kAtOnce<kPerLane>; ++c) {
        const int l = last - c, k = kWarpSize * t + l;
        const double inv = inv_of[c];
        double z[kRhs];
        LPLB_UNROLL
        for (int r = 0; r < kRhs; ++r) z[r] = warp.get(x.v[t][r], l) * inv;
        LPLB_UNROLL
        for (int s = 0; s <= t; ++s) {
          const int i = lane + kWarpSize * s;
          if (i < k) {
            LPLB_UNROLL
            for (int r = 0; r < kRhs; ++r) x.v[s][r] -= entry[c][s] * z[r];
          }
        }
      }
    }
  }
  LPLB_UNROLL
  for (int t = 0; t < kPerLane; ++t) {
    const int i = lane + kWarpSize * t;
    LPLB_UNROLL
    for (int r = 0; r < kRhs; ++r)
      if (i < n) x.v[t][r] *= inv_d[i];
  }
  store(lane, n, x, b);
}

}  // namespace rows

// The project's own algebra, for matrices up to kMost wide. Another one may stand in for it, see csrc/cuda.
template <int kMost>
struct BuiltinAlgebra {
  static constexpr int kPerLane = (kMost + kWarpSize - 1) / kWarpSize;

  // The width of the matrix for a group of n_ranks.
  LPLB_HD static constexpr int width(int n_ranks) { return (n_ranks + 7) / 8 * 8; }

  // M is factored in place, and M·x = b solved for the kRhs right-hand sides b[r·n … r·n + n). False when a pivot is
  // not positive; M and b are then overwritten in part. All members get the same answer.
  template <int kRhs, class Team>
  LPLB_HD static bool factor_and_solve(Team& team, int n, double* m, double* inv_d, double* b) {
#ifndef __CUDACC__
    if constexpr (Team::kSolo) {
      if (n == 8) {  // a size the compiler can unroll
        if (!solo::factor(8, m, inv_d)) return false;
        solo::forward<kRhs>(8, m, b);
        solo::backward<kRhs>(8, m, inv_d, b);
      } else {
        if (!solo::factor(n, m, inv_d)) return false;
        solo::forward<kRhs>(n, m, b);
        solo::backward<kRhs>(n, m, inv_d, b);
      }
      return true;
    }
#endif
    if (!panel::factor_and_forward<kRhs>(team, n, m, inv_d, b)) return false;
    team.first_warp([=](auto& warp) { rows::backward<kPerLane, kRhs>(warp, n, m, inv_d, b); });
    return true;
  }

  // Solves for one more right-hand side.
  template <class Team>
  LPLB_HD static void solve(Team& team, int n, const double* m, const double* inv_d, double* b) {
#ifndef __CUDACC__
    if constexpr (Team::kSolo) {
      if (n == 8) {
        solo::forward<1>(8, m, b);
        solo::backward<1>(8, m, inv_d, b);
      } else {
        solo::forward<1>(n, m, b);
        solo::backward<1>(n, m, inv_d, b);
      }
      return;
    }
#endif
    team.first_warp([=](auto& warp) {
      rows::forward<kPerLane, 1>(warp, n, m, b);
      warp.sync();
      rows::backward<kPerLane, 1>(warp, n, m, inv_d, b);
    });
  }
};

}  // namespace LPLB_ISA
}  // namespace lplb
