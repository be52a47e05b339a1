// Macros that the host and device parts of genrec's libraries share.
#pragma once

#if defined(__CUDACC__)
#define GENREC_HOST_DEVICE __host__ __device__
#else
// Always inlined: files compiled for a wider instruction set must not lend their copy of a shared function to the rest.
#define GENREC_HOST_DEVICE __attribute__((always_inline))
#endif

#if defined(_WIN32)
#define GENREC_API extern "C" __declspec(dllexport)
#else
#define GENREC_API extern "C" __attribute__((visibility("default")))
#endif
