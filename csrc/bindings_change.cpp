// lplb._C: changes of a placement. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "cpu/change.h"

namespace py = pybind11;

namespace {

std::tuple<std::vector<int32_t>, std::vector<int32_t>, std::vector<int32_t>> find_changes(Address phy2log, int n_physical, int n_logical, int n_ranks, int group_size, int ranks_per_node,
                      Address loads, int batches, Address cost, int most_writes, double most_cost, double wanted) {
  const lplb::ChangeTask task{at<const int32_t>(phy2log),
                              n_physical,
                              n_logical,
                              n_ranks,
                              group_size,
                              ranks_per_node,
                              at<const int64_t>(loads),
                              batches,
                              at<const double>(cost),
                              most_writes,
                              most_cost,
                              wanted};
  py::gil_scoped_release release;
  const lplb::ChangePath path = lplb::cpu::find_changes(task);
  std::vector<int32_t> ends, slots, experts;  // not a list for every step: these are no work for Python's collector
  for (const lplb::ChangeStep& step : path.steps) ends.push_back(step.end);
  for (const lplb::SlotWrite& write : path.writes) slots.push_back(write.slot), experts.push_back(write.expert);
  return {ends, slots, experts};
}

std::unique_ptr<lplb::cpu::PlacementRating> placement_rating(Address phy2log, int n_physical, int n_logical,
                                                             int n_ranks, int group_size, Address loads, int batches) {
  const lplb::ChangeTask task{at<const int32_t>(phy2log), n_physical, n_logical, n_ranks, group_size, n_ranks,
                              at<const int64_t>(loads),   batches,    nullptr,   0,       0.0,        0.0};
  py::gil_scoped_release release;
  return std::make_unique<lplb::cpu::PlacementRating>(task);
}

void relabel(Address current, Address target, int n_physical, int n_logical, int n_ranks, Address kind,
             const std::vector<int32_t>& blocks, Address out) {
  py::gil_scoped_release release;
  lplb::Relabelling(at<const int32_t>(current), at<const int32_t>(target), n_physical, n_logical, n_ranks,
                    at<const int32_t>(kind), {blocks.data(), static_cast<int>(blocks.size())})
      .run(at<int32_t>(out));
}

}  // namespace

void add_change(py::module_& m) {
  py::class_<lplb::cpu::PlacementRating>(m, "PlacementRating")
      .def(py::init(&placement_rating), py::arg("phy2log"), py::arg("n_physical"), py::arg("n_logical"),
           py::arg("n_ranks"), py::arg("group_size"), py::arg("loads"), py::arg("batches"))
      .def(
          "rate",
          [](lplb::cpu::PlacementRating& rating, Address phy2log, Address imbalance) {
            py::gil_scoped_release release;
            rating.rate(at<const int32_t>(phy2log), at<double>(imbalance));
          },
          py::arg("phy2log"), py::arg("imbalance"));
  m.def("find_changes", &find_changes, py::arg("phy2log"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("group_size"), py::arg("ranks_per_node"), py::arg("loads"), py::arg("batches"),
        py::arg("cost"), py::arg("most_writes"), py::arg("most_cost"), py::arg("wanted"));
  m.def("relabel", &relabel, py::arg("current"), py::arg("target"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("kind"), py::arg("blocks"), py::arg("out"));
}
