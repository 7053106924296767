// What bindings.cpp adds to lplb._C from bindings_eplb.cpp.
#pragma once

#include <pybind11/pybind11.h>

void add_eplb(pybind11::module_& m);
