"""Compiler flags that the kernels and loops of this library run faster with."""

XLA_FLAGS = " ".join(
    (
        # XLA's CPU keeps to 256-bit vectors unless told otherwise.
        "--xla_cpu_prefer_vector_width=512",
        # Loops and branches stay on the GPU, as part of a CUDA graph: the host does not read each condition.
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
        "--xla_gpu_graph_min_graph_size=1",
        # What does not depend on each other runs side by side: a step has many kernels that do next to nothing.
        "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
        # Kernels of Pallas read a part of an array where it lies, not a copy.
        "--xla_gpu_enable_dynamic_slice_fusion=true",
    )
)
"""A value for the environment variable of the same name, to be set before the first computation."""
