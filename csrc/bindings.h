// What the files that make lplb._C share: addresses come in as whole numbers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void add_eplb(pybind11::module_& m);            // bindings_eplb.cpp
void add_placing(pybind11::module_& m);         // bindings_placing.cpp
void add_change(pybind11::module_& m);          // bindings_change.cpp
void add_transfers(pybind11::module_& m);       // bindings_transfers.cpp
void add_ranges(pybind11::module_& m);          // bindings_ranges.cpp
void add_cuda_transfers(pybind11::module_& m);  // bindings_cuda_transfers.cpp, in builds with CUDA
