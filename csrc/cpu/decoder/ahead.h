// Memory that a thread will read soon. It is fetched into the L2 cache while the thread waits: otherwise
// nothing is read from memory between two products.
#pragma once

#include <cstdint>
#include <vector>

#include "../linear/products.h"

namespace oats {

class Ahead {
 public:
  // What comes next. The pieces must outlive it.
  void start(const std::vector<Piece>& pieces) {
    next_ = pieces.data();
    last_ = next_ + pieces.size();
    at_ = end_ = nullptr;
  }

  // Fetches one more line.
  void fetch() {
    if (at_ >= end_) {
      if (next_ == last_) return;
      at_ = next_->begin;
      end_ = at_ + next_->bytes;
      ++next_;
    }
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
  }

 private:
  const Piece *next_ = nullptr, *last_ = nullptr;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace oats
