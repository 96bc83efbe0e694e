/* TransformerEngine's core wheels bind this entry point of cuBLAS 13.2 when they are loaded; torch 2.11 brings cuBLAS
 * 13.1, which lacks it. It serves cuBLASLt's grouped products (mixtures of experts), which no dense model calls:
 * answer CUBLAS_STATUS_NOT_SUPPORTED. With cuBLAS 13.2 or newer no shim is needed. */
int cublasLtGroupedMatrixLayoutInit_internal(void) { return 15; }
