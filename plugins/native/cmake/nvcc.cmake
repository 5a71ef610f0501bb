# Finding nvcc and compiling with it.
#
# nvcc is called by rules of our own rather than through CMake's CUDA language: that language fixes one compiler before
# the project can try several, and its checks expect a whole toolkit where pip's packages hold the parts that we need.

set(SHUNTYARD_NVCC_MINIMUM 12.8)  # the first to know compute capability 12.0

# -gencode arguments for SHUNTYARD_CUDA_ARCHITECTURES.
#
# Hopper's own instructions (wgmma, setmaxnreg) are in 90a alone, whose machine code runs on every 9.0. PTX of 90a would
# run nowhere else, so that of 90 is added where 90 is the last.
function(shuntyard_gencode out)
  set(flags "")
  foreach(arch IN LISTS SHUNTYARD_CUDA_ARCHITECTURES)
    string(REGEX REPLACE "^90$" "90a" code ${arch})
    list(APPEND flags -gencode arch=compute_${code},code=sm_${code})
  endforeach()
  list(GET SHUNTYARD_CUDA_ARCHITECTURES -1 last)
  list(APPEND flags -gencode arch=compute_${last},code=compute_${last})
  set(${out} ${flags} PARENT_SCOPE)
endfunction()

# Tries a compiler on a small kernel. Sets <out> to an empty string, or to why the compiler cannot be used; and
# <out>_VERSION and <out>_CUDART.
function(shuntyard_try_nvcc nvcc out)
  set(${out} "" PARENT_SCOPE)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT text MATCHES "release [0-9.]+, V([0-9.]+)")
    set(${out} "it does not run" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  set(${out}_VERSION ${version} PARENT_SCOPE)
  if(version VERSION_LESS SHUNTYARD_NVCC_MINIMUM)
    set(${out} "it is version ${version}, ${SHUNTYARD_NVCC_MINIMUM} or newer is needed" PARENT_SCOPE)
    return()
  endif()

  # nvcc in PATH may be a link or a wrapper: only nvcc itself knows where its toolkit is.
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc.cu "#include <cuda_runtime.h>\n__global__ void kernel() {}\n")
  execute_process(COMMAND ${nvcc} --dryrun -c ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc.cu ERROR_VARIABLE text OUTPUT_QUIET)
  if(text MATCHES "TOP=([^\n]+)")
    string(STRIP "${CMAKE_MATCH_1}" top)
  endif()
  find_library(cudart cudart_static NO_CACHE
    HINTS ${top} ${top}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux ${top}/targets/sbsa-linux PATH_SUFFIXES lib lib64)
  if(NOT cudart)
    set(${out} "its libcudart_static.a is not found (toolkit: ${top})" PARENT_SCOPE)
    return()
  endif()
  set(${out}_CUDART ${cudart} PARENT_SCOPE)

  shuntyard_gencode(gencode)
  execute_process(
    COMMAND ${nvcc} -std=c++17 ${gencode} -c ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc.cu
      -o ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc.o
    OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    set(${out} "it fails to compile a small kernel:\n${text}" PARENT_SCOPE)
  endif()
endfunction()

# Decides by SHUNTYARD_CUDA. Sets SHUNTYARD_NVCC (empty: no kernels), SHUNTYARD_CUDART, SHUNTYARD_CUDA_SUMMARY, and what
# build_info.h.in asks for.
macro(shuntyard_find_nvcc)
  if(NOT SHUNTYARD_CUDA MATCHES "^(auto|machine|pip|off)$")
    message(FATAL_ERROR "SHUNTYARD_CUDA is '${SHUNTYARD_CUDA}', must be auto, machine, pip or off")
  endif()
  if(NOT SHUNTYARD_CUDA_ARCHITECTURES MATCHES "^[0-9]+(;[0-9]+)*$")
    message(FATAL_ERROR
      "SHUNTYARD_CUDA_ARCHITECTURES is '${SHUNTYARD_CUDA_ARCHITECTURES}', must be numbers as 89 or 90;120")
  endif()
  set(SHUNTYARD_NVCC "")
  set(SHUNTYARD_CUDA_JSON "null")
  set(SHUNTYARD_CUDA_SOURCE "off")
  set(SHUNTYARD_ARCHITECTURES_JSON "")
  set(SHUNTYARD_CUDA_SUMMARY "without kernels, enqueue will fail (SHUNTYARD_CUDA is ${SHUNTYARD_CUDA})")

  foreach(source IN ITEMS machine pip)
    if(SHUNTYARD_NVCC OR NOT SHUNTYARD_CUDA MATCHES "^(auto|${source})$")
      continue()
    endif()
    if(source STREQUAL "machine")
      find_program(candidate nvcc NO_CACHE
        HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    else()
      find_program(candidate nvcc NO_CACHE PATHS "${SHUNTYARD_PIP_CUDA_ROOT}/bin" NO_DEFAULT_PATH)
    endif()
    if(candidate)
      shuntyard_try_nvcc(${candidate} problem)
    else()
      set(problem "there is none")
    endif()
    if(problem STREQUAL "")
      set(SHUNTYARD_NVCC ${candidate})
      set(SHUNTYARD_CUDART ${problem_CUDART})
      set(SHUNTYARD_CUDA_JSON "\\\"${problem_VERSION}\\\"")
      set(SHUNTYARD_CUDA_SOURCE ${source})
      list(JOIN SHUNTYARD_CUDA_ARCHITECTURES ", " SHUNTYARD_ARCHITECTURES_JSON)
      set(SHUNTYARD_CUDA_SUMMARY
        "kernels by nvcc ${problem_VERSION} (${source}, ${candidate}) for ${SHUNTYARD_ARCHITECTURES_JSON}")
    elseif(SHUNTYARD_CUDA STREQUAL "auto" AND NOT candidate)
      message(STATUS "shuntyard plugins: no nvcc of ${source}")
    elseif(SHUNTYARD_CUDA STREQUAL "auto")
      message(WARNING "shuntyard plugins: nvcc of ${source}: ${problem}")
    else()
      message(FATAL_ERROR "SHUNTYARD_CUDA=${source}, but nvcc of ${source} cannot be used: ${problem}")
    endif()
    unset(candidate)
  endforeach()
endmacro()

# Compiles .cu files into <target> and links the CUDA runtime statically: the library loads without a driver. What ptxas
# says of registers, spills and shared memory is kept beside each object, as <file>.ptxas.txt.
function(shuntyard_add_kernels target)
  shuntyard_gencode(gencode)
  string(REPLACE ";" "," host_flags "-fPIC;-fvisibility=hidden;${SHUNTYARD_WARNINGS}")
  set(device_flags "")
  if(SHUNTYARD_BUILD_TESTS)
    set(device_flags --Werror all-warnings)
  endif()
  foreach(source IN LISTS ARGN)
    get_filename_component(name ${source} NAME)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      BYPRODUCTS ${CMAKE_CURRENT_BINARY_DIR}/${name}.ptxas.txt
      COMMAND ${CMAKE_COMMAND} -DREPORT=${CMAKE_CURRENT_BINARY_DIR}/${name}.ptxas.txt
        -P ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/compile.cmake --
        ${SHUNTYARD_NVCC} -std=c++17 -O3 ${gencode} ${device_flags} -Xptxas=-v -Xcompiler=${host_flags}
        -I${CMAKE_CURRENT_SOURCE_DIR} -MD -MT ${object} -MF ${object}.d
        -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object}
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/compile.cmake
      DEPFILE ${object}.d
      COMMENT "nvcc ${source}"
      VERBATIM)
    target_sources(${target} PRIVATE ${object})
  endforeach()
  target_compile_definitions(${target} PRIVATE SHUNTYARD_WITH_CUDA)
  find_package(Threads REQUIRED)
  target_link_libraries(${target} PRIVATE ${SHUNTYARD_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
endfunction()
