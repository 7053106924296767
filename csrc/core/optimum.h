// The optimum of one load on one group, without the split that reaches it: what placements are scored with, by the
// thousand. No rounding, no plan; the flow solver alone.
#pragma once

#include "solve.h"

namespace lplb {
inline namespace LPLB_ISA {

// t* in tokens per unit of speed. loads [n_logical] whole tokens; those of a scenario in fixed point are as good.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline double optimum(Warp& warp, const AnyGroup& g, const Workspace& x, const int64_t* loads) {
  const detail::Sum sum = detail::gather(warp, g, x, loads);
  return bottleneck_flow<kWords>(warp, g, x, sum.mean).bound * sum.mean;
}

}  // namespace LPLB_ISA
}  // namespace lplb
