// lplb._C: addresses and sizes in, nothing of torch. The Python side checks every argument; lplb/_C.pyi documents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/planner.h"

namespace py = pybind11;
using lplb::cpu::Chunks;
using lplb::cpu::PlanArrays;
using lplb::cpu::Planner;
using lplb::cpu::RankCounts;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

int64_t count(const Planner& p, Address indices, int index_bytes, std::tuple<int64_t, int, int64_t> chunks,
              Address prefix, int threads) {
  const Chunks c{std::get<0>(chunks), std::get<1>(chunks), std::get<2>(chunks)};
  py::gil_scoped_release release;
  return index_bytes == 8 ? p.count(at<const int64_t>(indices), c, at<int32_t>(prefix), threads)
                          : p.count(at<const int32_t>(indices), c, at<int32_t>(prefix), threads);
}

int64_t solve(Planner& p, Address loads, int64_t batch, int solver, std::array<Address, 7> out, Address log,
              int threads) {
  const PlanArrays arrays{at<int32_t>(out[0]), at<int64_t>(out[1]), at<int64_t>(out[2]), at<double>(out[3]),
                          at<double>(out[4]),  at<int32_t>(out[5]), at<int32_t>(out[6])};
  py::gil_scoped_release release;
  return p.solve(at<const int64_t>(loads), batch, static_cast<lplb::Solver>(solver), arrays,
                 at<lplb::IterationRow>(log), threads);
}

void assign(Planner& p, Address indices, int index_bytes, std::tuple<int64_t, int, int64_t> chunks, Address prefix,
            Address counts, int64_t stride, int source, Address quota, Address physical, int threads) {
  const Chunks c{std::get<0>(chunks), std::get<1>(chunks), std::get<2>(chunks)};
  const auto *pre = at<const int32_t>(prefix), *q = at<const int32_t>(quota);
  const RankCounts all{at<const int32_t>(counts), stride};
  py::gil_scoped_release release;
  if (index_bytes == 8)
    p.assign(at<const int64_t>(indices), c, pre, all, source, q, at<int64_t>(physical), threads);
  else
    p.assign(at<const int32_t>(indices), c, pre, all, source, q, at<int32_t>(physical), threads);
}

int64_t total(Address counts, int64_t stride, int n_ranks, int n_logical, Address loads) {
  return lplb::cpu::total({at<const int32_t>(counts), stride}, n_ranks, n_logical, at<int64_t>(loads));
}

void add(Address counter, int bytes, int64_t value) {
  if (bytes == 8)
    *at<int64_t>(counter) += value;
  else
    *at<int32_t>(counter) += static_cast<int32_t>(value);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("max_group_size") = lplb::kMaxGroup;
  m.attr("max_iterations") = lplb::kMaxIterations;
  m.attr("gap_tolerance") = lplb::kGapTolerance;
  m.attr("log_fields") = py::make_tuple("objective", "bound", "gap", "mu", "step_primal", "step_dual");
  m.attr("instruction_set") = lplb::cpu::best_instruction_set().name;
  m.attr("cuda") = false;
  m.def("total", &total, py::arg("counts"), py::arg("stride"), py::arg("n_ranks"), py::arg("n_logical"),
        py::arg("loads"));
  m.def("add", &add, py::arg("counter"), py::arg("bytes"), py::arg("value"));
  py::class_<Planner>(m, "CpuPlanner")
      .def(py::init<const std::vector<int32_t>&, int, int, int, const std::vector<double>&, int>(), py::arg("phy2log"),
           py::arg("n_logical"), py::arg("n_ranks"), py::arg("group_size"), py::arg("speed"), py::arg("max_threads"))
      .def_property_readonly("workspace_bytes", &Planner::workspace_bytes)
      .def("count", &count, py::arg("indices"), py::arg("index_bytes"), py::arg("chunks"), py::arg("prefix"),
           py::arg("threads"))
      .def("solve", &solve, py::arg("loads"), py::arg("batch"), py::arg("solver"), py::arg("out"), py::arg("log"),
           py::arg("threads"))
      .def("assign", &assign, py::arg("indices"), py::arg("index_bytes"), py::arg("chunks"), py::arg("prefix"),
           py::arg("counts"), py::arg("stride"), py::arg("source"), py::arg("quota"), py::arg("physical"),
           py::arg("threads"));
}
