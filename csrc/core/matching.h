// The best pairing of rows with columns: the Hungarian algorithm in the form of Jonker and Volgenant (Computing 38,
// 1987): one row after another joins by a shortest augmenting path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace lplb {
inline namespace LPLB_ISA {

// column_of [n]: the pairing with the largest sum of weight [n, n], row by row. O(n³); of equal ones always the same.
// Returns that sum.
inline int64_t match(int n, const int64_t* weight, int32_t* column_of) {
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;
  std::vector<int64_t> row_price(n + 1, 0), column_price(n + 1, 0), distance(n + 1);
  std::vector<int32_t> row_of(n + 1, 0), from(n + 1);  // counted from 1; 0 is the row that is to join
  std::vector<char> done(n + 1);
  for (int i = 1; i <= n; ++i) {
    row_of[0] = i;
    std::fill(distance.begin(), distance.end(), kFar);
    std::fill(done.begin(), done.end(), 0);
    int at = 0;
    do {
      done[at] = 1;
      const int row = row_of[at];
      int64_t nearest = kFar;
      int next = 0;
      for (int j = 1; j <= n; ++j) {
        if (done[j]) continue;
        const int64_t cost = -weight[static_cast<int64_t>(row - 1) * n + j - 1] - row_price[row] - column_price[j];
        if (cost < distance[j]) {
          distance[j] = cost;
          from[j] = at;
        }
        if (distance[j] < nearest) {
          nearest = distance[j];
          next = j;
        }
      }
      for (int j = 0; j <= n; ++j)
        if (done[j]) {
          row_price[row_of[j]] += nearest;
          column_price[j] -= nearest;
        } else {
          distance[j] -= nearest;
        }
      at = next;
    } while (row_of[at] != 0);
    for (; at != 0; at = from[at]) row_of[at] = row_of[from[at]];
  }
  int64_t sum = 0;
  for (int j = 1; j <= n; ++j) {
    column_of[row_of[j] - 1] = j - 1;
    sum += weight[static_cast<int64_t>(row_of[j] - 1) * n + j - 1];
  }
  return sum;
}

}  // namespace LPLB_ISA
}  // namespace lplb
