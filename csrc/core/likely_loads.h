// Likely loads of a layer, drawn around its history: what placements are scored on.
//
// Batches drift: an expert's load is its mean times a log-normal factor. From one load, a mean, nothing says how far:
// half the scenarios drift by σ = 0.3, half by 0.6. From a history of batches σ is estimated, for each expert by
// itself, shrunk towards that of all; and a scenario goes four fifths of the way, in variance, with one of the batches,
// so that experts which drift together do so here, and the rest on its own, so that nothing is fitted to batches that
// will not come again.
//
// Where redundancy is plenty, the LP levels all that is likely, on any placement. A few scenarios of stress, which
// drift much further and count for next to nothing, then say which has most in reserve.
//
// An expert's factors are the quantiles of its distribution in a random order (a Latin hypercube), so its mean and its
// spread are exact in every set of scenarios. Host only, and the same bits everywhere: no function of libm that IEEE
// 754 does not fix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace lplb::placing {

inline constexpr int kScenarios = 192;  // that placements are scored on
inline constexpr int kSamples = 96;     // others, that they are built with
inline constexpr int kStressEvery = 8;  // of the scenarios, the last of so many is one of stress
inline constexpr int kLikely = kScenarios - kScenarios / kStressEvery;
inline constexpr double kStress = 3.0;  // times the drift
inline constexpr double kMostDrift = 1.5;
inline constexpr double kDrift[2] = {0.3, 0.6};   // σ where the history is one load
inline constexpr double kLeastDrift = kDrift[0];  // what comes drifts further than a few batches show
inline constexpr double kWithBatch = 0.8;         // of the variance of a history of batches
inline constexpr double kPrior = 8.0;             // batches that the spread of all experts counts for in that of one

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>((next() >> 32) * static_cast<uint64_t>(n) >> 32); }

 private:
  uint64_t state_;
};

// e^x for |x| ≤ 6, to 1e-8.
inline double exponential(double x) {
  const double y = x / 256.0;
  double z = 1.0 + y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y / 24.0)));
  for (int i = 0; i < 8; ++i) z *= z;
  return z;
}

// σ of the log-normal distribution whose variance is cv2 times its mean's square: √ln(1 + cv2), at most kMostDrift.
inline double drift_of(double cv2) {
  double low = 0.0, high = kMostDrift;
  for (int i = 0; i < 24; ++i) {
    const double middle = 0.5 * (low + high);
    (exponential(middle * middle) < 1.0 + cv2 ? low : high) = middle;
  }
  return low;
}

// The normal distribution's quantiles at (k + ½) / n.
inline std::vector<double> normal_quantiles(int n) {
  const auto below = [](double z) {  // ½ + φ-series: Σ (-1)^k z^(2k+1) / (k! 2^k (2k+1)) / √(2π)
    double power = z, sum = z;
    for (int k = 1; k < 60; ++k) {
      power *= -z * z / (2.0 * k);
      sum += power / (2.0 * k + 1.0);
    }
    return 0.5 + sum * 0.3989422804014327;
  };
  std::vector<double> z(n);
  for (int k = 0; k < n; ++k) {
    double low = -4.0, high = 4.0;
    for (int i = 0; i < 40; ++i) {
      const double middle = 0.5 * (low + high);
      (below(middle) < (k + 0.5) / n ? low : high) = middle;
    }
    z[k] = low;
  }
  return z;
}

// Standard deviations z [n, n_logical], the same for every layer.
inline std::vector<float> deviations(int n, int n_logical, uint64_t seed) {
  const std::vector<double> quantile = normal_quantiles(n);
  std::vector<float> z(static_cast<size_t>(n) * n_logical);
  std::vector<int> order(n);
  Random random(seed);
  for (int e = 0; e < n_logical; ++e) {
    std::iota(order.begin(), order.end(), 0);
    for (int k = n - 1; k > 0; --k) std::swap(order[k], order[random.below(k + 1)]);
    for (int s = 0; s < n; ++s) z[static_cast<size_t>(s) * n_logical + e] = static_cast<float>(quantile[order[s]]);
  }
  return z;
}

inline bool is_stress(size_t s) { return s % kStressEvery == kStressEvery - 1; }

// What a layer's history says of its loads.
class Outlook {
 public:
  // history [batches, n_logical]: finite, not negative, not all 0.
  Outlook(const double* history, int64_t batches, int n_logical);
  size_t batches() const { return share_.size() / n_logical_; }  // that are not empty
  const std::vector<double>& mean() const { return mean_; }      // [n_logical], adding up to 1
  const std::vector<double>& spread() const { return spread_; }  // [n_logical] standard deviations of the same

  // Calls use(s, loads [n_logical]), adding up to 1, for n scenarios with deviations(n, n_logical, …). stressed: those
  // with is_stress(s) drift further.
  template <class Use>
  void draw(int n, const std::vector<float>& z, bool stressed, Use use) const;

 private:
  void estimate_drift();
  size_t step() const;

  size_t n_logical_;
  std::vector<double> share_;  // [batches, n_logical] each batch adding up to 1; empty ones are left out
  std::vector<double> mean_, spread_, drift_;
};

inline Outlook::Outlook(const double* history, int64_t batches, int n_logical)
    : n_logical_(n_logical), mean_(n_logical, 0.0), spread_(n_logical, 0.0), drift_(n_logical, kDrift[1]) {
  for (const double* batch = history; batches > 0; --batches, batch += n_logical) {
    const double sum = std::accumulate(batch, batch + n_logical, 0.0);
    if (!(sum > 0.0)) continue;
    for (int e = 0; e < n_logical; ++e) share_.push_back(batch[e] / sum);
  }
  for (size_t i = 0; i < share_.size(); ++i) mean_[i % n_logical_] += share_[i];
  for (double& m : mean_) m /= static_cast<double>(this->batches());
  if (this->batches() > 1) {
    estimate_drift();
  } else {
    const double cv = std::sqrt(exponential(kDrift[0] * kDrift[1]) - 1.0);  // between the two
    for (size_t e = 0; e < n_logical_; ++e) spread_[e] = cv * mean_[e];
  }
}

inline void Outlook::estimate_drift() {
  std::vector<double> squares(n_logical_, 0.0);
  for (size_t i = 0; i < share_.size(); ++i) {
    const double d = share_[i] - mean_[i % n_logical_];
    squares[i % n_logical_] += d * d;
  }
  double all = 0.0, means = 0.0;
  for (size_t e = 0; e < n_logical_; ++e) all += squares[e], means += mean_[e] * mean_[e];
  const double freedom = static_cast<double>(batches() - 1), pooled = all / (freedom * means);
  for (size_t e = 0; e < n_logical_; ++e) {
    const double m2 = mean_[e] * mean_[e];
    const double variance = (squares[e] + kPrior * pooled * m2) / (freedom + kPrior);
    drift_[e] = std::max(kLeastDrift, m2 > 0.0 ? drift_of(variance / m2) : 0.0);
    spread_[e] = std::sqrt(variance);
  }
}

// From one scenario's batch to the next one's: far, so that the first scenarios see all of a long history, and without
// a factor in common with the number of batches, so that all get their turn.
inline size_t Outlook::step() const {
  size_t step = batches() * 618 / 1000;
  while (std::gcd(step, batches()) != 1) ++step;
  return step;
}

template <class Use>
void Outlook::draw(int n, const std::vector<float>& z, bool stressed, Use use) const {
  const bool one = batches() == 1;
  const double with_batch = std::sqrt(kWithBatch), alone = std::sqrt(1.0 - kWithBatch);
  const size_t step = this->step();
  std::vector<double> w(n_logical_);
  for (size_t s = 0; s < static_cast<size_t>(n); ++s) {
    const double* batch = &share_[s * step % batches() * n_logical_];
    const double own =
        (one ? kDrift[(s + s / kStressEvery) % 2] / kDrift[1] : alone) * (stressed && is_stress(s) ? kStress : 1.0);
    double sum = 0.0;
    for (size_t e = 0; e < n_logical_; ++e) {
      const double base = one ? mean_[e] : mean_[e] + with_batch * (batch[e] - mean_[e]);
      const double drift = std::min(own * drift_[e], kMostDrift);
      w[e] = base * exponential(drift * (z[s * n_logical_ + e] - 0.5 * drift));
      sum += w[e];
    }
    for (double& load : w) load /= sum;
    use(s, w.data());
  }
}

}  // namespace lplb::placing
