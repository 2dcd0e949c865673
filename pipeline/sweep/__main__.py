"""python -m pipeline.sweep"""

from pipeline.sweep import main

main()
