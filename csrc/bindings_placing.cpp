// lplb._C: placements scored and made. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "core/likely_loads.h"
#include "cpu/placing.h"

namespace py = pybind11;

namespace {

void placement_optima(Address phy2log, int n_physical, int n_logical, int n_ranks, int group_size, Address loads,
                      int64_t batch, Address out, int threads) {
  py::gil_scoped_release release;
  lplb::cpu::placement_optima(at<const int32_t>(phy2log), n_physical, n_logical, n_ranks, group_size,
                              at<const double>(loads), batch, at<double>(out), threads);
}

// geometry: n_logical, n_ranks, n_physical, n_parts, ranks_per_node
void place_for_lp(std::array<int, 5> geometry, bool even, Address history, int64_t layers, int64_t batches,
                  Address from, Address also, Address phy2log, int threads) {
  const lplb::cpu::Geometry g{geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], even};
  py::gil_scoped_release release;
  lplb::cpu::place_for_lp(g, at<const double>(history), layers, batches, at<const double>(from),
                          at<const int32_t>(also), at<int32_t>(phy2log), threads);
}

void likely_loads(Address history, int64_t batches, int n_logical, Address out) {
  py::gil_scoped_release release;
  lplb::cpu::likely_loads(at<const double>(history), batches, n_logical, at<double>(out));
}

}  // namespace

void add_placing(py::module_& m) {
  m.def("placement_optima", &placement_optima, py::arg("phy2log"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("group_size"), py::arg("loads"), py::arg("batch"), py::arg("out"),
        py::arg("threads"));
  m.def("place_for_lp", &place_for_lp, py::arg("geometry"), py::arg("even"), py::arg("history"), py::arg("layers"),
        py::arg("batches"), py::arg("sent"), py::arg("also"), py::arg("phy2log"), py::arg("threads"));
  m.def("likely_loads", &likely_loads, py::arg("history"), py::arg("batches"), py::arg("n_logical"), py::arg("out"));
  m.attr("scenarios") = lplb::placing::kLikely;
}
