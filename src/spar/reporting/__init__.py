"""HTML reports of runs, scores and the four tasks, and the view of the routing, also used by the web page."""
