"""Turn Pascal VOC annotations into COCO-format JSON; --help lists the options."""

from ghm_d2.data.voc_command import main

if __name__ == "__main__":
    main()
