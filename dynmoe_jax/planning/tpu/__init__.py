"""Plans for TPUs, from the program that the TPU's compiler made."""
