"""What a run costs before any GPU is rented: parameters, FLOPs, bytes on each rank, communication, time."""
