# Which programs each package holds. The lab's programs are those of the hosts' own distribution, all found in
# /opt/lab/tools; a package is a directory of links to them.
{
  # One program with many names, as nixpkgs builds it: `bin/cat` is a link to `bin/coreutils`, so resolving the
  # link of a program loses which one was meant.
  coreutils = [
    "["
    "b2sum"
    "base32"
    "base64"
    "basename"
    "basenc"
    "cat"
    "chcon"
    "chgrp"
    "chmod"
    "chown"
    "cksum"
    "comm"
    "cp"
    "csplit"
    "cut"
    "date"
    "dd"
    "df"
    "dir"
    "dircolors"
    "dirname"
    "du"
    "echo"
    "env"
    "expand"
    "expr"
    "factor"
    "false"
    "fmt"
    "fold"
    "groups"
    "head"
    "hostid"
    "id"
    "install"
    "join"
    "link"
    "ln"
    "logname"
    "ls"
    "md5sum"
    "mkdir"
    "mkfifo"
    "mknod"
    "mktemp"
    "mv"
    "nice"
    "nl"
    "nohup"
    "nproc"
    "numfmt"
    "od"
    "paste"
    "pathchk"
    "pinky"
    "pr"
    "printenv"
    "printf"
    "ptx"
    "pwd"
    "readlink"
    "realpath"
    "rm"
    "rmdir"
    "runcon"
    "seq"
    "sha1sum"
    "sha224sum"
    "sha256sum"
    "sha384sum"
    "sha512sum"
    "shred"
    "shuf"
    "sleep"
    "sort"
    "split"
    "stat"
    "stdbuf"
    "stty"
    "sum"
    "sync"
    "tac"
    "tail"
    "tee"
    "test"
    "timeout"
    "touch"
    "tr"
    "true"
    "truncate"
    "tsort"
    "tty"
    "uname"
    "unexpand"
    "uniq"
    "unlink"
    "users"
    "vdir"
    "wc"
    "who"
    "whoami"
    "yes"
  ];

  links = {
    bash = [
      "bash"
      "sh"
    ];
    bashInteractive = [
      "bash"
      "sh"
    ];
    curl = [ "curl" ];
    dash = [ "dash" ];
    diffutils = [
      "cmp"
      "diff"
    ];
    findutils = [
      "find"
      "xargs"
    ];
    gawk = [
      "awk"
      "gawk"
    ];
    getent = [ "getent" ];
    git = [ "git" ];
    gitMinimal = [ "git" ];
    gnugrep = [
      "egrep"
      "fgrep"
      "grep"
    ];
    gnused = [ "sed" ];
    gnutar = [ "tar" ];
    gzip = [
      "gunzip"
      "gzip"
      "zcat"
    ];
    iproute2 = [
      "ip"
      "ss"
    ];
    nix = [
      "nix"
      "nix-build"
      "nix-channel"
      "nix-collect-garbage"
      "nix-copy-closure"
      "nix-daemon"
      "nix-env"
      "nix-hash"
      "nix-instantiate"
      "nix-prefetch-url"
      "nix-shell"
      "nix-store"
    ];
    nodejs = [ "node" ];
    openbao = [ "bao" ];
    openssh = [
      "scp"
      "ssh"
      "ssh-keygen"
      "ssh-keyscan"
    ];
    procps = [
      "free"
      "pgrep"
      "pkill"
      "ps"
      "top"
      "uptime"
    ];
    python3 = [ "python3" ];
    shadow = [
      "passwd"
      "su"
    ];
    systemd = [
      "busctl"
      "hostnamectl"
      "journalctl"
      "loginctl"
      "systemctl"
      "systemd-analyze"
      "systemd-cat"
      "systemd-creds"
      "systemd-detect-virt"
      "systemd-escape"
      "systemd-id128"
      "systemd-notify"
      "systemd-path"
      "systemd-run"
      "systemd-sysusers"
      "systemd-tmpfiles"
      "timedatectl"
      "udevadm"
    ];
    util-linux = [
      "choom"
      "dmesg"
      "findmnt"
      "flock"
      "hexdump"
      "ionice"
      "kill"
      "logger"
      "lsblk"
      "lscpu"
      "lsns"
      "more"
      "mount"
      "mountpoint"
      "nsenter"
      "prlimit"
      "renice"
      "rev"
      "setpriv"
      "setsid"
      "taskset"
      "umount"
      "unshare"
      "uuidgen"
    ];
    wget = [ "wget" ];
    which = [ "which" ];
  };

  # Programs that a lab host may not have: the package is there and its program says what is missing.
  optional = {
    gnumake = [ "make" ];
    iputils = [ "ping" ];
    jq = [ "jq" ];
    kmod = [
      "lsmod"
      "modprobe"
    ];
    ripgrep = [ "rg" ];
    rsync = [ "rsync" ];
    unzip = [ "unzip" ];
    xz = [
      "unxz"
      "xz"
    ];
    zstd = [ "zstd" ];
  };
}
