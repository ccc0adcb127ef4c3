// What a call of the C API says of its failure: vlmq_last_error's message.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "vlmq.h"

namespace vlmq {

/// The calling thread's last failure, and the call of the C API that it is in. Plain data, so that
/// a new thread's copies need no constructor and the objects no C++ library.
inline thread_local char last_failure[768];
inline thread_local const char* current_call = "";

/// Adds to the message what still fits.
__attribute__((format(printf, 1, 2))) inline void say(const char* format, ...) {
  const size_t length = std::strlen(last_failure);
  va_list values;
  va_start(values, format);
  std::vsnprintf(last_failure + length, sizeof(last_failure) - length, format, values);
  va_end(values);
}

/// Begins the message of a new failure with the call's name.
inline void begin_failure() {
  last_failure[0] = '\0';
  if (*current_call != '\0') say("%s: ", current_call);
}

/// Something enqueued: the runtime's function, and of a launch the kernel and its configuration.
struct Operation {
  const char* function;
  const char* kernel;  // null: no launch
  dim3 grid, block;
  size_t shared_bytes;
};

/// Begins the message of an operation that did not succeed with all but the reason.
inline void begin_failure(const Operation& of) {
  begin_failure();
  say("%s", of.function);
  if (of.kernel == nullptr) return say(": ");
  // In parentheses where a comma would part the macro's arguments.
  const bool in_parentheses = of.kernel[0] == '(';
  const int length = static_cast<int>(std::strlen(of.kernel)) - 2 * in_parentheses;
  say(" of %.*s (grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory): ", length,
      of.kernel + in_parentheses, of.grid.x, of.grid.y, of.grid.z, of.block.x, of.block.y,
      of.block.z, of.shared_bytes);
}

/// Ends the message of an error that a kernel raised while it ran, which is told by whatever the
/// runtime is asked for next.
inline void say_it_is_late() {
  say("; a kernel enqueued before caused it, in this call or an earlier one (under "
      "CUDA_LAUNCH_BLOCKING=1, this one)");
}

/// Runs the body of a call, and says what it does not say itself.
template <class Arguments>
vlmq_status run_call(const char* name, vlmq_status (*body)(const Arguments*, vlmq_stream),
                     const Arguments* args, vlmq_stream stream) {
  current_call = name;
  const vlmq_status status = body(args, stream);
  if (status == VLMQ_BAD_ARGUMENT) {
    begin_failure();
    say(args == nullptr ? "no arguments (NULL)"
                        : "an argument is outside what vlmq.h documents of %s_args",
        name);
  }
  return status;
}

}  // namespace vlmq

/// `VLMQ_CALL(vlmq_add, args, stream) { body }` defines a call of the C API. The body enqueues
/// through launch.cuh, which reports for it, or returns VLMQ_BAD_ARGUMENT.
#define VLMQ_CALL(name, args, stream)                                          \
  static vlmq_status name##_body(const name##_args* args, vlmq_stream stream); \
  extern "C" vlmq_status name(const name##_args* args, vlmq_stream stream) {   \
    return ::vlmq::run_call(#name, name##_body, args, stream);                 \
  }                                                                            \
  static vlmq_status name##_body(const name##_args* args, vlmq_stream stream)
