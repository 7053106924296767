// lplb._C: plans with transfers, and tokens by range, on CUDA. Addresses and sizes in, as in bindings.cpp.
#include <limits>

#include "bindings.h"
#include "cuda/transfer_planner.h"

namespace py = pybind11;
using lplb::ServingPlan;
using lplb::TransferArrays;
using lplb::cuda::CountTable;
using lplb::cuda::TransferPlanner;

namespace {

using CountsAt = std::tuple<Address, int, int, int64_t>;  // address, bytes of a count, rows, stride

cudaStream_t stream_at(Address a) { return at<CUstream_st>(a); }

CountTable counts_at(const CountsAt& t, int ranks_per_node) {
  return {at<const void>(std::get<0>(t)), std::get<1>(t), std::get<3>(t), std::get<2>(t), ranks_per_node};
}

TransferArrays arrays_at(const std::array<Address, 6>& out) {
  return {at<int64_t>(out[0]), at<int64_t>(out[1]), at<int32_t>(out[2]),
          at<int32_t>(out[3]), at<int64_t>(out[4]), at<double>(out[5])};
}

// -1 stands for no limit.
template <class T>
T limit(int64_t given) {
  return given < 0 ? std::numeric_limits<T>::max() : static_cast<T>(given);
}

void joint(const TransferPlanner& p, const CountsAt& counts, double tolerance, int64_t max_tokens,
           int64_t max_transfers, int64_t min_tokens, Address held, std::array<Address, 6> out, Address stream) {
  const lplb::JointRules rules{tolerance, limit<int64_t>(max_tokens), limit<int>(max_transfers),
                               std::max(int64_t{1}, min_tokens)};
  py::gil_scoped_release release;
  p.joint(counts_at(counts, 0), rules, at<const int32_t>(held), arrays_at(out), stream_at(stream));
}

void llep(const TransferPlanner& p, const CountsAt& counts, double alpha, int64_t m, double lam, bool compat,
          int64_t max_tokens, std::array<Address, 6> out, Address stream) {
  py::gil_scoped_release release;
  p.llep(counts_at(counts, 0), {alpha, m, lam, compat, max_tokens}, arrays_at(out), stream_at(stream));
}

void route(const TransferPlanner& p, std::tuple<Address, Address> plan, const CountsAt& counts, int ranks_per_node,
           int source, std::tuple<Address, int, int64_t> indices, int n_sms, Address slots, Address send,
           Address stream) {
  const ServingPlan serving{at<const int64_t>(std::get<0>(plan)), at<const int32_t>(std::get<1>(plan))};
  const auto& [first, index_bytes, n] = indices;
  py::gil_scoped_release release;
  p.route(serving, counts_at(counts, ranks_per_node), source, at<const void>(first), index_bytes, n, n_sms,
          at<void>(slots), at<int64_t>(send), stream_at(stream));
}

}  // namespace

void add_cuda_transfers(py::module_& m) {
  py::class_<TransferPlanner>(m, "CudaTransfers")
      .def(py::init<const std::vector<int32_t>&, const std::vector<int32_t>&, int, int, int, int, int64_t, int>(),
           py::arg("resident_rank"), py::arg("resident_expert"), py::arg("n_logical"), py::arg("n_ranks"),
           py::arg("slots"), py::arg("domain"), py::arg("shared_bytes"), py::arg("sms"))
      .def_property_readonly("tables",
                             [](const TransferPlanner& p) {
                               return py::bytes(reinterpret_cast<const char*>(p.image().data()), p.image().size());
                             })
      .def_property_readonly("scratch_bytes", &TransferPlanner::scratch_bytes)
      .def_property_readonly("rows", &TransferPlanner::n_rows)
      .def_property_readonly("width", &TransferPlanner::width)
      .def(
          "launches",
          [](const TransferPlanner& p, int64_t n, int n_sms) {
            py::list all;
            for (const auto& l : p.launches(n, n_sms))
              all.append(py::make_tuple(l.kernel, l.blocks, l.threads, l.shared));
            return all;
          },
          py::arg("n"), py::arg("n_sms"))
      .def(
          "bind",
          [](TransferPlanner& p, Address tables, Address scratch, Address faults) {
            p.bind(at<void>(tables), at<void>(scratch), at<int64_t>(faults));
          },
          py::arg("tables"), py::arg("scratch"), py::arg("faults"))
      .def("joint", &joint, py::arg("counts"), py::arg("tolerance"), py::arg("max_tokens"), py::arg("max_transfers"),
           py::arg("min_tokens"), py::arg("held"), py::arg("out"), py::arg("stream"))
      .def("llep", &llep, py::arg("counts"), py::arg("alpha"), py::arg("m"), py::arg("lam"), py::arg("compat"),
           py::arg("max_tokens"), py::arg("out"), py::arg("stream"))
      .def("route", &route, py::arg("plan"), py::arg("counts"), py::arg("ranks_per_node"), py::arg("source"),
           py::arg("indices"), py::arg("n_sms"), py::arg("slots"), py::arg("send"), py::arg("stream"));
}
