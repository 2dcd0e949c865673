"""python -m pipeline.evaluate"""

from pipeline.evaluate import main

main()
