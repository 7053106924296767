// lplb._C: placements scored and made. Addresses and sizes in, as in bindings.cpp.
#include "bindings_placing.h"

#include "cpu/placing.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void placement_optima(Address phy2log, int n_physical, int n_logical, int n_ranks, int group_size, Address loads,
                      int64_t batch, Address out, int threads) {
  py::gil_scoped_release release;
  lplb::cpu::placement_optima(at<const int32_t>(phy2log), n_physical, n_logical, n_ranks, group_size,
                              at<const double>(loads), batch, at<double>(out), threads);
}

}  // namespace

void add_placing(py::module_& m) {
  m.def("placement_optima", &placement_optima, py::arg("phy2log"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("group_size"), py::arg("loads"), py::arg("batch"), py::arg("out"),
        py::arg("threads"));
}
