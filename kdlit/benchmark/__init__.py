"""What training costs: ``python -m kdlit.benchmark --help`` lists the measurements, each of which explains itself."""
