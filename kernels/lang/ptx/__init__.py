"""The operations of GPUs only, in PTX; a file for each thing that they work on."""
