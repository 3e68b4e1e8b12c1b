"""How lodeset is run: command line, the whole graph, reports, the sample world."""
