# Where TensorRT's headers are found, our declaration of its binary interface is held to them: one probe is compiled
# against each, and what the two print must be the same.

find_path(nv_infer_dir NvInferRuntime.h NO_CACHE
  HINTS ${TENSORRT_INCLUDE_DIR} PATHS /usr/include/${CMAKE_LIBRARY_ARCHITECTURE} /usr/local/tensorrt/include
    /usr/local/TensorRT/include /opt/tensorrt/include)
if(TENSORRT_INCLUDE_DIR AND NOT EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h)
  message(FATAL_ERROR "TENSORRT_INCLUDE_DIR is ${TENSORRT_INCLUDE_DIR}, but NvInferRuntime.h is not there")
endif()

set(nv_infer_v3 "")
if(nv_infer_dir)
  file(STRINGS ${nv_infer_dir}/NvInferRuntime.h nv_infer_v3 REGEX "class IPluginV3OneBuild" LIMIT_COUNT 1)
endif()

if(nv_infer_v3)
  message(STATUS "shuntyard plugins: the plugin interface is checked against ${nv_infer_dir}")
  set(check ${CMAKE_CURRENT_SOURCE_DIR}/abi/check)
  add_executable(shuntyard_abi_ours ${check}/probe.cpp)
  add_executable(shuntyard_abi_theirs ${check}/probe.cpp)
  target_compile_definitions(shuntyard_abi_theirs PRIVATE SHUNTYARD_PROBE_TENSORRT)
  target_compile_options(shuntyard_abi_theirs PRIVATE -idirafter ${check}/without_cuda)
  target_include_directories(shuntyard_abi_theirs SYSTEM PRIVATE ${nv_infer_dir})
  add_custom_target(shuntyard_abi_check ALL
    COMMAND ${CMAKE_COMMAND} -DOURS=$<TARGET_FILE:shuntyard_abi_ours> -DTHEIRS=$<TARGET_FILE:shuntyard_abi_theirs>
      -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/compare.cmake
    VERBATIM)
  add_dependencies(shuntyard_abi_check shuntyard_abi_ours shuntyard_abi_theirs)
elseif(nv_infer_dir)
  # TensorRT 8 and 9, which many a machine still has: nothing to compare with, and no reason to fail an installation.
  message(STATUS "shuntyard plugins: ${nv_infer_dir} has no V3 plugins, the plugin interface is not checked against it")
else()
  message(STATUS "shuntyard plugins: no TensorRT headers found, the plugin interface is not checked against them")
endif()
