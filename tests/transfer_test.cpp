// Plans with transfers and tokens by range, as the CUDA backend's blocks make them, on host threads: every result must
// have the bits of one thread.
//
//     transfer_test [scale]     scale 1 takes some seconds
#include <cstdio>
#include <cstdlib>

#include "allocations.h"
#include "joint_team.h"
#include "llep_team.h"
#include "range_team.h"

int main(int argc, char** argv) {
  const double scale = argc > 1 ? std::atof(argv[1]) : 1.0;
  if (!(scale > 0.0 && scale <= 1000.0)) {
    std::printf("scale %s, allowed is above 0 and up to 1000\n", argv[1]);
    return 2;
  }
  check_allocations_are_counted();
  for (const int size : {32, 64, 128, 256}) compare_ranges(size, scale);
  for (const int size : {32, 128}) joint_team::compare_all(size, scale, allocations);
  llep_team::compare(scale, allocations);
  std::printf("%ld passed, 0 failed\n", passed);
  return 0;
}
