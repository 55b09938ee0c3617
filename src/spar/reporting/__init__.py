"""HTML reports of runs, scores and the four tasks; the routing drawing that the web page shows too."""
