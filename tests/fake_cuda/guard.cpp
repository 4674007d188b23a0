// Torch asks a device for its guard before it copies there; a CPU build has none for CUDA.
#include <c10/core/impl/FakeGuardImpl.h>

static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>());
