cmake_minimum_required(VERSION 3.22)

# cmake -DREPORT=FILE -P compile.cmake -- COMMAND...
#
# Runs a compiler that was asked for ptxas's report (-Xptxas=-v). The report goes to FILE, all else that was printed on,
# and a failure stays one.

set(command "")
set(seen FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(place RANGE ${last})
  if(seen)
    string(REPLACE ";" "\\;" argument "${CMAKE_ARGV${place}}")
    list(APPEND command "${argument}")
  elseif(CMAKE_ARGV${place} STREQUAL "--")
    set(seen TRUE)
  endif()
endforeach()

execute_process(COMMAND ${command} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE status)
set(text "${output}${errors}")
set(lines "(ptxas info[^\n]*|    [0-9]+ bytes stack frame[^\n]*)\n")
string(REGEX MATCHALL "${lines}" report "${text}")
string(REGEX REPLACE "${lines}" "" rest "${text}")
list(JOIN report "" report)
if(NOT rest STREQUAL "")
  message("${rest}")
endif()
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the compiler failed: ${status}")
endif()
file(WRITE ${REPORT} "${report}")
