"""Results of benchmarks and profiles as one HTML page, and as plots for papers."""
