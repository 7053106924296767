// What bindings.cpp adds to lplb._C from bindings_placing.cpp.
#pragma once

#include <pybind11/pybind11.h>

void add_placing(pybind11::module_& m);
