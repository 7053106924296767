// lplb._C: plans with transfers. Addresses and sizes in, as in bindings.cpp.
#include "bindings.h"
#include "cpu/transfers.h"

namespace py = pybind11;
using lplb::cpu::TransferCounts;
using lplb::cpu::Transfers;

namespace {

using Counts = std::tuple<Address, int, int, int64_t>;  // address, bytes of a count, rows, stride
using Arrays = std::tuple<Address, Address, Address, Address, Address, Address>;

TransferCounts counts_at(const Counts& c) {
  return {at<const void>(std::get<0>(c)), std::get<1>(c), std::get<2>(c), std::get<3>(c)};
}

lplb::TransferArrays arrays_at(const Arrays& a) {
  return {at<int64_t>(std::get<0>(a)), at<int64_t>(std::get<1>(a)), at<int32_t>(std::get<2>(a)),
          at<int32_t>(std::get<3>(a)), at<int64_t>(std::get<4>(a)), at<double>(std::get<5>(a))};
}

lplb::JointRules rules_of(double tolerance, int64_t max_tokens, int max_transfers, int64_t min_tokens) {
  return {tolerance, max_tokens < 0 ? INT64_MAX : max_tokens, max_transfers < 0 ? INT32_MAX : max_transfers,
          std::max<int64_t>(min_tokens, 1)};
}

int64_t joint(Transfers& t, const Counts& counts, double tolerance, int64_t max_tokens, int max_transfers,
              int64_t min_tokens, Address held, const Arrays& out) {
  const lplb::TransferArrays arrays = arrays_at(out);
  py::gil_scoped_release release;
  return t.joint(counts_at(counts), rules_of(tolerance, max_tokens, max_transfers, min_tokens), at<const int32_t>(held),
                 arrays);
}

int64_t llep(Transfers& t, const Counts& counts, double alpha, int64_t m, double lam, bool compat, int64_t max_tokens,
             const Arrays& out) {
  const lplb::TransferArrays arrays = arrays_at(out);
  py::gil_scoped_release release;
  return t.llep(counts_at(counts), {alpha, m, lam, compat, max_tokens}, arrays);
}

std::pair<int64_t, int> front(Transfers& t, const Counts& counts, int max_transfers, int64_t min_tokens, Address held,
                              Address max_load, Address transfers, int capacity) {
  int n = 0;
  py::gil_scoped_release release;
  const int64_t refused = t.front(counts_at(counts), rules_of(0.0, -1, max_transfers, min_tokens),
                                  at<const int32_t>(held), at<int64_t>(max_load), at<int32_t>(transfers), capacity, &n);
  return {refused, n};
}

}  // namespace

void add_transfers(py::module_& m) {
  m.attr("most_transfer_tokens") = lplb::kMostTransferTokens;
  m.attr("transfer_numbers") = static_cast<int>(lplb::kTransferNumbers);
  py::class_<Transfers>(m, "CpuTransfers")
      .def(py::init<const std::vector<int32_t>&, const std::vector<int32_t>&, int, int, int, int>(),
           py::arg("resident_rank"), py::arg("resident_expert"), py::arg("n_logical"), py::arg("n_ranks"),
           py::arg("slots"), py::arg("domain"))
      .def_property_readonly("rows", [](const Transfers& t) { return t.problem().n_rows; })
      .def("joint", &joint, py::arg("counts"), py::arg("tolerance"), py::arg("max_tokens"), py::arg("max_transfers"),
           py::arg("min_tokens"), py::arg("held"), py::arg("out"))
      .def("llep", &llep, py::arg("counts"), py::arg("alpha"), py::arg("m"), py::arg("lam"), py::arg("compat"),
           py::arg("max_tokens"), py::arg("out"))
      .def("front", &front, py::arg("counts"), py::arg("max_transfers"), py::arg("min_tokens"), py::arg("held"),
           py::arg("max_load"), py::arg("transfers"), py::arg("capacity"));
}
