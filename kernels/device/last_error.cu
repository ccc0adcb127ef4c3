// The message that the other calls leave.

#include "device/launch.cuh"

extern "C" const char* vlmq_last_error(void) { return vlmq::last_failure; }
