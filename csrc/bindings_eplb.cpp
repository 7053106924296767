// lplb._C: EPLB, and what explains placements. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "cpu/bottleneck.h"
#include "cpu/eplb.h"

namespace py = pybind11;

namespace {

lplb::eplb::Sizes sizes_of(const std::array<int, 5>& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

lplb::cpu::Layers layers_at(int64_t n, const std::array<Address, 5>& a) {
  return {n, at<const float>(a[0]), at<const float>(a[1]), at<int64_t>(a[2]), at<int32_t>(a[3]), at<int64_t>(a[4])};
}

int64_t place(const std::array<int, 5>& sizes, int64_t n, const std::array<Address, 5>& arrays, int rule, int threads) {
  py::gil_scoped_release release;
  return lplb::cpu::place_layers(sizes_of(sizes), layers_at(n, arrays), static_cast<lplb::eplb::Rule>(rule), threads);
}

void list_slots(const std::array<int, 5>& sizes, int64_t n, const std::array<Address, 5>& arrays, int64_t most_copies,
                Address log2phy, int threads) {
  py::gil_scoped_release release;
  lplb::cpu::list_slots(sizes_of(sizes), layers_at(n, arrays), most_copies, at<int64_t>(log2phy), threads);
}

std::vector<bool> bottleneck_ranks(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                                   Address loads) {
  py::gil_scoped_release release;
  return lplb::cpu::bottleneck_ranks(phy2log, n_logical, n_ranks, group_size, at<const int64_t>(loads));
}

}  // namespace

void add_eplb(py::module_& m) {
  m.def("eplb_place", &place, py::arg("sizes"), py::arg("layers"), py::arg("arrays"), py::arg("rule"),
        py::arg("threads"));
  m.def("eplb_log2phy", &list_slots, py::arg("sizes"), py::arg("layers"), py::arg("arrays"), py::arg("most_copies"),
        py::arg("log2phy"), py::arg("threads"));
  m.def("bottleneck_ranks", &bottleneck_ranks, py::arg("phy2log"), py::arg("n_logical"), py::arg("n_ranks"),
        py::arg("group_size"), py::arg("loads"));
}
