"""The data: found on disk, held in memory, augmented, sampled and batched."""
