# Fails if host code calls a device function: nvcc compiles such a call inside a template without a word, as one that ends
# the process by exit(1), and its objects refer to exit for nothing else.
#
#      cmake -DNM=nm -DOBJECTS=a.o,b.o -P check_host_calls.cmake
string(REPLACE "," ";" objects "${OBJECTS}")
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} --undefined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(symbols MATCHES " U exit\n")
    message(FATAL_ERROR "${object}: a function of the host calls one that is marked LOCAS_DEVICE, which would end the "
                        "process; make the latter constexpr without LOCAS_DEVICE. objdump -dr shows who calls exit")
  endif()
endforeach()
