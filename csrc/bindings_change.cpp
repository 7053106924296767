// lplb._C: changes of a placement. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "cpu/change.h"

namespace py = pybind11;

namespace {

std::tuple<std::vector<int32_t>, std::vector<int32_t>, std::vector<int32_t>> find_changes(
    Address phy2log, int n_physical, int n_logical, int n_ranks, int group_size, int ranks_per_node, Address loads,
    int batches, Address cost, int most_writes, double most_cost, double wanted) {
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

using Layer = std::tuple<Address, Address, int, Address, int>;  // phy2log, search, batches, kept back, batches
using Look = std::tuple<py::bytes, std::vector<int32_t>, std::vector<int32_t>, std::vector<int32_t>,
                        std::vector<std::pair<int, py::bytes>>>;

py::bytes as_bytes(const std::vector<double>& x) {
  return {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(double)};
}

std::vector<Look> look_for_changes(const std::vector<Layer>& layers, int n_physical, int n_logical, int n_ranks,
                                   int group_size, int ranks_per_node, Address cost, int most_writes, double most_cost,
                                   const std::tuple<double, double, double, double>& aims) {
  std::vector<lplb::ChangeLook> found;
  {
    py::gil_scoped_release release;  // for all layers together: to get it back may take long
    const auto [gain, min_gain, spare, nearly] = aims;
    for (const auto& [phy2log, search, n_search, kept_back, n_kept] : layers) {
      const lplb::ChangeTask task{at<const int32_t>(phy2log),
                                  n_physical,
                                  n_logical,
                                  n_ranks,
                                  group_size,
                                  ranks_per_node,
                                  at<const int64_t>(search),
                                  n_search,
                                  at<const double>(cost),
                                  most_writes,
                                  most_cost,
                                  0.0};
      found.push_back(
          lplb::cpu::look_for_changes(task, at<const int64_t>(kept_back), n_kept, {gain, min_gain, spare, nearly}));
    }
  }
  std::vector<Look> looks;
  for (const lplb::ChangeLook& look : found) {
    std::vector<int32_t> ends, slots, experts;
    for (const lplb::ChangeStep& step : look.path.steps) ends.push_back(step.end);
    for (const lplb::SlotWrite& write : look.path.writes) slots.push_back(write.slot), experts.push_back(write.expert);
    std::vector<std::pair<int, py::bytes>> rated;
    for (const auto& [steps, imbalance] : look.rated) rated.emplace_back(steps, as_bytes(imbalance));
    looks.emplace_back(as_bytes(look.before), ends, slots, experts, rated);
  }
  return looks;
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
  m.def("look_for_changes", &look_for_changes, py::arg("layers"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("group_size"), py::arg("ranks_per_node"), py::arg("cost"), py::arg("most_writes"),
        py::arg("most_cost"), py::arg("aims"));
  m.def("relabel", &relabel, py::arg("current"), py::arg("target"), py::arg("n_physical"), py::arg("n_logical"),
        py::arg("n_ranks"), py::arg("kind"), py::arg("blocks"), py::arg("out"));
}
