// What bindings.cpp adds to lplb._C from bindings_change.cpp.
#pragma once

#include <pybind11/pybind11.h>

void add_change(pybind11::module_& m);
