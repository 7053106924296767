// The search for changes of a placement on the CPU. Pointers and sizes only; the caller has checked all arguments.
#pragma once

#include "../core/change.h"
#include "../core/relabel.h"

namespace lplb::cpu {

ChangePath find_changes(const ChangeTask& task);

}  // namespace lplb::cpu
