// The OpenMP threads that the core shares with torch.
#pragma once

namespace oats {

// Ends the threads that OpenMP keeps between the regions of the calling thread; its next region starts new
// ones. To be called before a fork: the child has none of those threads, but its first region would wait for
// them, and never return. Inside a region it does nothing.
void release_threads();

}  // namespace oats
