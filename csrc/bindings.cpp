// lplb._C: addresses and sizes in, nothing of torch. The Python side checks every argument; lplb/_C.pyi documents.
#include "bindings.h"

#include "cpu/planner.h"
#ifdef LPLB_HAVE_CUDA
#include "cuda/planner.h"
#endif

namespace py = pybind11;
using lplb::PlanArrays;
using lplb::Sources;
using lplb::cpu::Chunks;
using lplb::cpu::Planner;

namespace {

PlanArrays plan_at(const std::array<Address, 7>& out) {
  return {at<int32_t>(out[0]), at<int64_t>(out[1]), at<int64_t>(out[2]), at<double>(out[3]),
          at<double>(out[4]),  at<int32_t>(out[5]), at<int32_t>(out[6])};
}

int64_t count(const Planner& p, Address indices, int index_bytes, std::tuple<int64_t, int, int64_t> chunks,
              Address prefix, int threads) {
  const Chunks c{std::get<0>(chunks), std::get<1>(chunks), std::get<2>(chunks)};
  py::gil_scoped_release release;
  return index_bytes == 8 ? p.count(at<const int64_t>(indices), c, at<int32_t>(prefix), threads)
                          : p.count(at<const int32_t>(indices), c, at<int32_t>(prefix), threads);
}

// (address, stride, ranks, ranks per node)
using SourceTable = std::tuple<Address, int64_t, int, int>;

Sources sources_at(const SourceTable& t) {
  return {at<const int32_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

int64_t solve(Planner& p, Address loads, int64_t batch, const SourceTable& from, int64_t fewest, int solver,
              std::array<Address, 7> out, Address log, int threads) {
  const PlanArrays arrays = plan_at(out);
  py::gil_scoped_release release;
  return p.solve(at<const int64_t>(loads), batch, sources_at(from), fewest, static_cast<lplb::Solver>(solver), arrays,
                 at<lplb::IterationRow>(log), threads);
}

int64_t solve_traffic(Planner& p, Address loads, const SourceTable& from, int64_t fewest, double weight,
                      std::array<Address, 7> out, Address log) {
  const PlanArrays arrays = plan_at(out);
  py::gil_scoped_release release;
  return p.solve_traffic(at<const int64_t>(loads), sources_at(from), fewest, weight, arrays,
                         at<lplb::IterationRow>(log));
}

void shares(const Planner& p, const SourceTable& from, int source, int split, Address quota, Address status,
            Address weights, Address starts) {
  p.shares(sources_at(from), source, static_cast<lplb::Split>(split), at<int32_t>(quota), at<int32_t>(status),
           {at<int32_t>(weights), at<int32_t>(starts)});
}

void tokens_by_source(const Planner& p, const SourceTable& from, int split, Address quota, Address status,
                      Address tokens) {
  py::gil_scoped_release release;
  p.tokens_by_source(sources_at(from), static_cast<lplb::Split>(split), at<int32_t>(quota), at<int32_t>(status),
                     at<int32_t>(tokens));
}

void assign(Planner& p, Address indices, int index_bytes, std::tuple<int64_t, int, int64_t> chunks, Address prefix,
            Address weights, Address starts, Address physical, int threads) {
  const Chunks c{std::get<0>(chunks), std::get<1>(chunks), std::get<2>(chunks)};
  const auto* pre = at<const int32_t>(prefix);
  const lplb::cpu::Shares s{at<int32_t>(weights), at<int32_t>(starts)};
  py::gil_scoped_release release;
  if (index_bytes == 8)
    p.assign(at<const int64_t>(indices), c, pre, s, at<int64_t>(physical), threads);
  else
    p.assign(at<const int32_t>(indices), c, pre, s, at<int32_t>(physical), threads);
}

int64_t total(const SourceTable& from, int n_logical, Address loads) {
  return lplb::cpu::total(sources_at(from), n_logical, at<int64_t>(loads));
}

void add(Address counter, int bytes, int64_t value) {
  if (bytes == 8)
    *at<int64_t>(counter) += value;
  else
    *at<int32_t>(counter) += static_cast<int32_t>(value);
}

// "a;b" as ("a", "b")
py::tuple words(const std::string& text) { return py::tuple(py::str(text).attr("split")(";")); }

#ifdef LPLB_HAVE_CUDA
using CudaPlanner = lplb::cuda::Planner;

cudaStream_t stream_at(Address a) { return at<CUstream_st>(a); }

// A launch may wait for room in the stream's queue: other Python threads go on meanwhile.
void cuda_count(const CudaPlanner& p, Address indices, int index_bytes, int64_t n, int blocks, int64_t length,
                Address prefix, Address row, Address stream) {
  py::gil_scoped_release release;
  p.count(at<void>(indices), index_bytes, {n, length}, blocks, at<int32_t>(prefix), at<int32_t>(row),
          stream_at(stream));
}

void cuda_solve(const CudaPlanner& p, Address loads, int64_t batch, int solver, std::array<Address, 7> out, Address log,
                Address stream) {
  py::gil_scoped_release release;
  p.solve(at<int64_t>(loads), batch, {}, 0, static_cast<lplb::Solver>(solver), plan_at(out),
          at<lplb::IterationRow>(log), stream_at(stream));
}

lplb::ShareRule rule_of(const SourceTable& from, int source, int split, const PlanArrays& plan) {
  return {sources_at(from), source, static_cast<lplb::Split>(split), 0, plan.quota, plan.status};
}

void cuda_solve_table(const CudaPlanner& p, const SourceTable& from, const std::vector<int32_t>& expected,
                      int64_t fewest, Address loads, int solver, std::array<Address, 7> out, Address counter,
                      int counter_bytes, Address log, Address stream) {
  lplb::cuda::ExchangedTable t{};
  t.from = sources_at(from);
  t.n_words = static_cast<int>(expected.size());
  if (t.n_words > lplb::cuda::kCheckWords)
    throw std::invalid_argument("words are " + std::to_string(t.n_words) + ", allowed are " +
                                std::to_string(lplb::cuda::kCheckWords));
  std::copy(expected.begin(), expected.end(), t.words);
  t.counter = at<void>(counter);
  t.counter_bytes = counter_bytes;
  py::gil_scoped_release release;
  p.solve(at<int64_t>(loads), 1, t, fewest, static_cast<lplb::Solver>(solver), plan_at(out),
          at<lplb::IterationRow>(log), stream_at(stream));
}

void cuda_assign(const CudaPlanner& p, Address indices, int index_bytes, int64_t n, int blocks, int64_t length,
                 Address prefix, const SourceTable& from, int source, int split, std::array<Address, 7> plan,
                 Address physical, Address stream) {
  const auto rule = rule_of(from, source, split, plan_at(plan));
  py::gil_scoped_release release;
  p.assign(at<void>(indices), index_bytes, {n, length}, blocks, at<int32_t>(prefix), rule, at<void>(physical),
           stream_at(stream));
}

void cuda_run(const CudaPlanner& p, Address indices, int index_bytes, int64_t n, int n_sms, Address row, int64_t fewest,
              Address loads, int solver, std::array<Address, 7> out, Address counter, int counter_bytes,
              Address physical, Address stream) {
  const lplb::cuda::Blocks blocks = p.blocks(n, n_sms);
  const lplb::Cut cut{n, blocks.length};
  const SourceTable alone{row, 0, 1, 0};
  lplb::cuda::ExchangedTable t{};
  t.from = sources_at(alone);
  t.counter = at<void>(counter);
  t.counter_bytes = counter_bytes;
  const auto plan = plan_at(out);
  py::gil_scoped_release release;
  p.count(at<void>(indices), index_bytes, cut, blocks.count, p.prefix(), at<int32_t>(row), stream_at(stream));
  p.solve(at<int64_t>(loads), 1, t, fewest, static_cast<lplb::Solver>(solver), plan, nullptr, stream_at(stream));
  p.assign(at<void>(indices), index_bytes, cut, blocks.count, p.prefix(), rule_of(alone, 0, 0, plan),
           at<void>(physical), stream_at(stream));
}

void add_cuda(py::module_& m) {
  py::class_<CudaPlanner>(m, "CudaPlanner")
      .def(py::init<const std::vector<int32_t>&, int, int, int, const std::vector<double>&, const std::string&, int64_t,
                    int>(),
           py::arg("phy2log"), py::arg("n_logical"), py::arg("n_ranks"), py::arg("group_size"), py::arg("speed"),
           py::arg("linalg"), py::arg("shared_bytes"), py::arg("sms"))
      .def_property_readonly("tables",
                             [](const CudaPlanner& p) {
                               return py::bytes(reinterpret_cast<const char*>(p.image().data()), p.image().size());
                             })
      .def_property_readonly("scratch_bytes", &CudaPlanner::scratch_bytes)
      .def_property_readonly("linalg", &CudaPlanner::algebra)
      .def(
          "launches",
          [](const CudaPlanner& p, int64_t n, int, int n_sms, int64_t batch) {
            py::list all;
            for (const auto& l : p.launches(n, n_sms, batch))
              all.append(py::make_tuple(l.kernel, l.blocks, l.threads, l.shared));
            return all;
          },
          py::arg("n"), py::arg("index_bytes"), py::arg("n_sms"), py::arg("batch"))
      .def(
          "blocks",
          [](const CudaPlanner& p, int64_t n, int n_sms) {
            const auto b = p.blocks(n, n_sms);
            return py::make_tuple(b.count, b.length);
          },
          py::arg("n"), py::arg("n_sms"))
      .def(
          "bind",
          [](CudaPlanner& p, Address tables, Address scratch, Address faults) {
            p.bind(at<void>(tables), at<void>(scratch), at<int64_t>(faults));
          },
          py::arg("tables"), py::arg("scratch"), py::arg("faults"))
      .def("count", &cuda_count, py::arg("indices"), py::arg("index_bytes"), py::arg("n"), py::arg("blocks"),
           py::arg("length"), py::arg("prefix"), py::arg("row"), py::arg("stream"))
      .def("solve", &cuda_solve, py::arg("loads"), py::arg("batch"), py::arg("solver"), py::arg("out"), py::arg("log"),
           py::arg("stream"))
      .def("solve_table", &cuda_solve_table, py::arg("table"), py::arg("words"), py::arg("fewest"), py::arg("loads"),
           py::arg("solver"), py::arg("out"), py::arg("counter"), py::arg("counter_bytes"), py::arg("log"),
           py::arg("stream"))
      .def("assign", &cuda_assign, py::arg("indices"), py::arg("index_bytes"), py::arg("n"), py::arg("blocks"),
           py::arg("length"), py::arg("prefix"), py::arg("table"), py::arg("source"), py::arg("split"), py::arg("plan"),
           py::arg("physical"), py::arg("stream"))
      .def("run", &cuda_run, py::arg("indices"), py::arg("index_bytes"), py::arg("n"), py::arg("n_sms"), py::arg("row"),
           py::arg("fewest"), py::arg("loads"), py::arg("solver"), py::arg("out"), py::arg("counter"),
           py::arg("counter_bytes"), py::arg("physical"), py::arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("max_group_size") = lplb::kMaxGroup;
  m.attr("max_iterations") = lplb::kMaxIterations;
  m.attr("gap_tolerance") = lplb::kGapTolerance;
  m.attr("node_cost") = lplb::kNodeCost;
  m.attr("log_fields") = py::make_tuple("objective", "bound", "gap", "mu", "step_primal", "step_dual");
  m.attr("instruction_set") = lplb::cpu::best_instruction_set().name;
#ifdef LPLB_HAVE_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_targets") = words(LPLB_CUDA_TARGETS);
  m.attr("cuda_version") = LPLB_CUDA_VERSION;
  add_cuda(m);
  add_cuda_transfers(m);
#else
  m.attr("cuda") = false;
  m.attr("cuda_targets") = py::tuple();
  m.attr("cuda_version") = "";
#endif
#ifdef LPLB_HAVE_CUSOLVERDX
  m.attr("linalgs") = words("builtin;cusolverdx");
  m.attr("mathdx_version") = LPLB_MATHDX_VERSION;
  m.attr("cusolverdx_targets") = words(LPLB_CUSOLVERDX_TARGETS);
#else
  m.attr("linalgs") = words("builtin");
  m.attr("mathdx_version") = "";
  m.attr("cusolverdx_targets") = py::tuple();
#endif
  m.def("total", &total, py::arg("table"), py::arg("n_logical"), py::arg("loads"));
  m.def("add", &add, py::arg("counter"), py::arg("bytes"), py::arg("value"));
  add_eplb(m);
  add_placing(m);
  add_change(m);
  add_transfers(m);
  add_ranges(m);
  py::class_<Planner>(m, "CpuPlanner")
      .def(py::init<const std::vector<int32_t>&, int, int, int, const std::vector<double>&, int>(), py::arg("phy2log"),
           py::arg("n_logical"), py::arg("n_ranks"), py::arg("group_size"), py::arg("speed"), py::arg("max_threads"))
      .def_property_readonly("workspace_bytes", &Planner::workspace_bytes)
      .def("count", &count, py::arg("indices"), py::arg("index_bytes"), py::arg("chunks"), py::arg("prefix"),
           py::arg("threads"))
      .def("solve", &solve, py::arg("loads"), py::arg("batch"), py::arg("table"), py::arg("fewest"), py::arg("solver"),
           py::arg("out"), py::arg("log"), py::arg("threads"))
      .def("solve_traffic", &solve_traffic, py::arg("loads"), py::arg("table"), py::arg("fewest"), py::arg("weight"),
           py::arg("out"), py::arg("log"))
      .def("shares", &shares, py::arg("table"), py::arg("source"), py::arg("split"), py::arg("quota"),
           py::arg("status"), py::arg("weights"), py::arg("starts"))
      .def("tokens_by_source", &tokens_by_source, py::arg("table"), py::arg("split"), py::arg("quota"),
           py::arg("status"), py::arg("tokens"))
      .def("assign", &assign, py::arg("indices"), py::arg("index_bytes"), py::arg("chunks"), py::arg("prefix"),
           py::arg("weights"), py::arg("starts"), py::arg("physical"), py::arg("threads"));
}
