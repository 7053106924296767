// What the C++ tests have in common: they count what passed, and end at the first failure.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

inline long passed = 0;

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED after %ld passed: %s\n", passed, what.c_str());
  std::exit(1);
}

inline void check(bool ok, const std::string& what) {
  if (!ok) fail(what);
  ++passed;
}

using Random = std::mt19937_64;

inline int draw(Random& random, int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); }
inline double draw(Random& random, double least, double most) {
  return std::uniform_real_distribution<double>(least, most)(random);
}
