// lplb._C: tokens to virtual slots by range. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "cpu/ranges.h"

namespace py = pybind11;
using lplb::BasicSources;
using lplb::ServingPlan;
using lplb::cpu::Chunks;
using lplb::cpu::RangeMap;
using lplb::cpu::RouteFault;

namespace {

using PlanAt = std::tuple<Address, Address>;              // quota, guests
using CountsAt = std::tuple<Address, int, int, int64_t>;  // address, bytes of a count, rows, stride
using IndicesAt = std::tuple<Address, int, int64_t>;      // address, bytes, number

ServingPlan plan_at(const PlanAt& t) { return {at<const int64_t>(std::get<0>(t)), at<const int32_t>(std::get<1>(t))}; }

// f(sources) with counts of the type that they have.
template <class F>
auto with_counts(const CountsAt& t, int ranks_per_node, F f) {
  const auto& [address, bytes, rows, stride] = t;
  if (bytes == 8) return f(BasicSources<int64_t>{at<const int64_t>(address), stride, rows, ranks_per_node});
  return f(BasicSources<int32_t>{at<const int32_t>(address), stride, rows, ranks_per_node});
}

std::tuple<int64_t, int64_t> route(const RangeMap& map, const PlanAt& plan, const CountsAt& counts, int ranks_per_node,
                                   int source, const IndicesAt& indices, Address slots, Address send, int threads) {
  const Address address = std::get<0>(indices);
  const bool wide = std::get<1>(indices) == 8;
  const int64_t n = std::get<2>(indices);
  const Chunks chunks{n, threads, std::max(int64_t{1}, (n + threads - 1) / threads)};
  const ServingPlan serving = plan_at(plan);
  py::gil_scoped_release release;
  const RouteFault fault = with_counts(counts, ranks_per_node, [&](const auto& from) {
    if (wide)
      return lplb::cpu::route(map, serving, from, source, at<const int64_t>(address), chunks, at<int64_t>(slots),
                              at<int64_t>(send), threads);
    return lplb::cpu::route(map, serving, from, source, at<const int32_t>(address), chunks, at<int32_t>(slots),
                            at<int64_t>(send), threads);
  });
  return {fault.index, fault.expert};
}

void send_all(const RangeMap& map, const PlanAt& plan, const CountsAt& counts, int ranks_per_node, Address tokens) {
  const ServingPlan serving = plan_at(plan);
  py::gil_scoped_release release;
  with_counts(counts, ranks_per_node,
              [&](const auto& from) { lplb::cpu::send_all(map, serving, from, at<int64_t>(tokens)); });
}

}  // namespace

void add_ranges(py::module_& m) {
  py::class_<RangeMap>(m, "CpuRanges")
      .def(py::init<const std::vector<int32_t>&, const std::vector<int32_t>&, int, int, int>(),
           py::arg("resident_rank"), py::arg("resident_expert"), py::arg("n_logical"), py::arg("n_ranks"),
           py::arg("slots"))
      .def_property_readonly("width", [](const RangeMap& map) { return map.tables().width(); })
      .def("route", &route, py::arg("plan"), py::arg("counts"), py::arg("ranks_per_node"), py::arg("source"),
           py::arg("indices"), py::arg("slots"), py::arg("send"), py::arg("threads"))
      .def("send_all", &send_all, py::arg("plan"), py::arg("counts"), py::arg("ranks_per_node"), py::arg("tokens"));
}
