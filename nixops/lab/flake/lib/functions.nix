# Plain functions on strings, lists and attribute sets. Nothing here knows of modules.
let
  inherit (builtins)
    attrNames
    concatLists
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    genList
    hasAttr
    head
    isAttrs
    isList
    isString
    length
    listToAttrs
    map
    match
    replaceStrings
    split
    stringLength
    substring
    tail
    toString
    ;

  l = rec {
    inherit (builtins)
      add
      all
      any
      attrNames
      attrValues
      bitAnd
      bitOr
      catAttrs
      ceil
      compareVersions
      concatLists
      concatMap
      concatStringsSep
      deepSeq
      div
      elem
      elemAt
      filter
      floor
      foldl'
      fromJSON
      functionArgs
      genList
      getAttr
      groupBy
      hasAttr
      hashString
      head
      intersectAttrs
      isAttrs
      isBool
      isFloat
      isFunction
      isInt
      isList
      isPath
      isString
      length
      lessThan
      listToAttrs
      map
      mapAttrs
      match
      mul
      partition
      pathExists
      readDir
      readFile
      removeAttrs
      replaceStrings
      seq
      sort
      split
      splitVersion
      stringLength
      sub
      substring
      tail
      throw
      toJSON
      trace
      tryEval
      typeOf
      zipAttrsWith
      ;

    # -- trivial
    id = x: x;
    const = x: _: x;
    flip =
      f: a: b:
      f b a;
    pipe = foldl' (x: f: f x);
    min = a: b: if a < b then a else b;
    max = a: b: if a > b then a else b;
    boolToString = b: if b then "true" else "false";
    importJSON = file: builtins.fromJSON (builtins.readFile file);
    warn = message: builtins.trace "warning: ${message}";
    warnIf = condition: message: if condition then warn message else id;
    throwIf = condition: message: if condition then throw message else id;
    throwIfNot = condition: throwIf (!condition);
    assertMsg = condition: message: condition || throw message;
    version = "24.11";
    versionAtLeast = a: b: builtins.compareVersions a b >= 0;
    versionOlder = a: b: builtins.compareVersions a b < 0;

    # -- lists
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: list: if condition then list else [ ];
    toList = x: if isList x then x else [ x ];
    singleton = x: [ x ];
    last = list: elemAt list (length list - 1);
    init = list: take (length list - 1) list;
    take = n: list: genList (elemAt list) (min n (length list));
    drop = n: list: genList (i: elemAt list (i + n)) (max 0 (length list - n));
    sublist =
      start: count: list:
      take count (drop start list);
    range = first: end: genList (i: first + i) (max 0 (end - first + 1));
    reverseList = list: genList (i: elemAt list (length list - 1 - i)) (length list);
    imap0 = f: list: genList (i: f i (elemAt list i)) (length list);
    imap1 = f: imap0 (i: f (i + 1));
    flatten = x: if isList x then builtins.concatMap flatten x else [ x ];
    unique = foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
    subtractLists = remove: filter (x: !elem x remove);
    intersectLists = a: filter (x: elem x a);
    remove = x: filter (y: y != x);
    foldr =
      f: end: list:
      foldl' (acc: x: f x acc) end (reverseList list);
    fold = foldr;
    findFirst =
      predicate: default: list:
      let
        found = filter predicate list;
      in
      if found == [ ] then default else head found;
    count = predicate: list: length (filter predicate list);
    zipListsWith =
      f: a: b:
      genList (i: f (elemAt a i) (elemAt b i)) (min (length a) (length b));
    forEach = list: f: map f list;
    naturalSort = builtins.sort (a: b: builtins.compareVersions a b < 0);

    # -- attribute sets
    nameValuePair = name: value: { inherit name value; };
    optionalAttrs = condition: set: if condition then set else { };
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    attrsToList = mapAttrsToList nameValuePair;
    concatMapAttrs = f: set: mergeAttrsList (mapAttrsToList f set);
    mergeAttrsList = foldl' (a: b: a // b) { };
    filterAttrs =
      predicate: set:
      builtins.removeAttrs set (filter (name: !predicate name set.${name}) (attrNames set));
    filterAttrsRecursive =
      predicate: set:
      builtins.mapAttrs (_: v: if isAttrs v && !isDerivation v then filterAttrsRecursive predicate v else v) (
        filterAttrs predicate set
      );
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    foldlAttrs =
      f: start: set:
      foldl' (acc: name: f acc name set.${name}) start (attrNames set);
    getAttrs = names: set: genAttrs names (name: set.${name});
    setAttrByPath = path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
    attrByPath =
      path: default: set:
      if path == [ ] then
        set
      else if isAttrs set && hasAttr (head path) set then
        attrByPath (tail path) default set.${head path}
      else
        default;
    hasAttrByPath =
      path: set: path == [ ] || (isAttrs set && hasAttr (head path) set && hasAttrByPath (tail path) set.${head path});
    getAttrFromPath =
      path: attrByPath path (throw "cannot find attribute `${concatStringsSep "." path}'");
    recursiveUpdate =
      a: b:
      a
      // builtins.mapAttrs (
        name: value:
        if isAttrs value && !isDerivation value && isAttrs (a.${name} or null) && !isDerivation a.${name} then
          recursiveUpdate a.${name} value
        else
          value
      ) b;
    mapAttrsRecursive =
      f:
      let
        go = path: builtins.mapAttrs (n: v: if isAttrs v && !isDerivation v then go (path ++ [ n ]) v else f (path ++ [ n ]) v);
      in
      go [ ];
    # The leaves of a nested set as a list: `f path value` for each.
    collectLeaves =
      f:
      let
        go = path: set: concatLists (
          mapAttrsToList (n: v: if isAttrs v && !isDerivation v then go (path ++ [ n ]) v else [ (f (path ++ [ n ]) v) ]) set
        );
      in
      go [ ];
    mapAttrsToListRecursive = collectLeaves;
    isDerivation = value: value.type or null == "derivation";
    zipAttrs = builtins.zipAttrsWith (_: values: values);

    # -- strings
    optionalString = condition: text: if condition then text else "";
    concatStrings = concatStringsSep "";
    concatMapStrings = f: list: concatStrings (map f list);
    concatMapStringsSep =
      sep: f: list:
      concatStringsSep sep (map f list);
    concatImapStringsSep =
      sep: f: list:
      concatStringsSep sep (imap1 f list);
    concatMapAttrsStringSep =
      sep: f: set:
      concatStringsSep sep (mapAttrsToList f set);
    concatLines = concatMapStrings (line: line + "\n");
    join = concatStringsSep;
    intersperse = sep: list: if list == [ ] then [ ] else tail (builtins.concatMap (x: [ sep x ]) list);
    stringToCharacters = text: genList (i: substring i 1 text) (stringLength text);
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    hasSuffix =
      suffix: text:
      let
        n = stringLength text;
        m = stringLength suffix;
      in
      n >= m && substring (n - m) m text == suffix;
    hasInfix = infix: text: replaceStrings [ infix ] [ "" ] text != text || infix == "";
    removePrefix =
      prefix: text: if hasPrefix prefix text then substring (stringLength prefix) (stringLength text) text else text;
    removeSuffix =
      suffix: text: if hasSuffix suffix text then substring 0 (stringLength text - stringLength suffix) text else text;
    splitString = sep: text: filter isString (split (escapeRegex sep) text);
    escape = list: replaceStrings list (map (c: "\\${c}") list);
    escapeRegex = escape (stringToCharacters "\\[{()^$?*+|.");
    escapeShellArg =
      arg:
      let
        text = toString arg;
      in
      if match "[[:alnum:],._+:@%/-]+" text != null then text else "'${replaceStrings [ "'" ] [ "'\\''" ] text}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    escapeNixString = text: replaceStrings [ "$" ] [ "\\$" ] (builtins.toJSON text);
    toLower = replaceStrings (stringToCharacters upper) (stringToCharacters lower);
    toUpper = replaceStrings (stringToCharacters lower) (stringToCharacters upper);
    upper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    lower = "abcdefghijklmnopqrstuvwxyz";
    fileContents = file: removeSuffix "\n" (builtins.readFile file);
    trim =
      text:
      let
        m = match "[ \t\r\n]*(.*[^ \t\r\n])[ \t\r\n]*" text;
      in
      if m == null then "" else head m;
    toInt =
      text:
      if match "-?[0-9]+" text != null then builtins.fromJSON text else throw "Could not convert ${builtins.toJSON text} to int.";
    strToPretty = builtins.toJSON;
    generators = {
      toJSON = _: builtins.toJSON;
      toYAML = _: builtins.toJSON;
      toKeyValue =
        _: set: concatStrings (mapAttrsToList (k: v: "${k}=${if builtins.isBool v then boolToString v else toString v}\n") set);
    };

    # -- packages
    getBin = package: package;
    getExe' = package: name: "${package}/bin/${name}";
    getExe = package: getExe' package (package.meta.mainProgram or package.pname or package.name);
    makeSearchPath = dir: packages: concatMapStringsSep ":" (p: "${p}/${dir}") (filter (p: p != null) packages);
    makeSearchPathOutput = _: makeSearchPath;
    makeBinPath = makeSearchPath "bin";
  };
in
l
